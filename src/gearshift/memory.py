"""How much main memory this process has taken. No torch."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_resident_memory() -> int:
    """Bytes of resident memory of this process at most, without what its own parent held."""
    status = Path("/proc/self/status")
    if status.exists():
        # Linux counts the parent's in ru_maxrss, too.
        (kilobytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", status.read_text(encoding="utf-8"), re.MULTILINE)
        return int(kilobytes) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
