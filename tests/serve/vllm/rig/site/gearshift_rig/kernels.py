"""Lets Triton's interpreter run the linear-attention kernels that vLLM brings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

PACKAGE = "vllm.third_party.flash_linear_attention.ops"
FUNCTIONS = ("exp", "exp2", "log", "log2")


def let_interpret() -> None:
    """Mend the modules of the kernels that are imported by now.

    They keep functions of ``triton.language`` under names of their own, which the interpreter does not see
    when it replaces those functions; a name that looks them up when it is called is enough.
    """
    import triton.language as tl

    for name, module in list(sys.modules.items()):
        for function in FUNCTIONS if name.startswith(PACKAGE) else ():
            if getattr(module, function, None) is getattr(tl, function):
                setattr(module, function, _late(tl, function))


def _late(tl: Any, function: str) -> Callable[..., Any]:
    return lambda *arguments, **named: getattr(tl, function)(*arguments, **named)
