"""The settings under which vLLM runs here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

SITE = Path(__file__).parents[1]
SETTINGS = {
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    # The engine runs in the test's own process, so that a test can look into it.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # GiB; the tests say how many blocks they want, this is only the ceiling.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # vLLM would bind each tensor-parallel rank to a NUMA node of its own; most machines have one.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "TRITON_INTERPRET": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def prepare() -> None:
    """Set the environment and make the plugins found, here and in children; before vllm is imported."""
    assert "vllm" not in sys.modules
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    sys.path.insert(0, str(SITE))
    import gearshift

    source = Path(gearshift.__file__).parents[1]
    paths = [str(SITE), str(source), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
