"""Lets Triton's interpreter run the linear-attention kernels that vLLM brings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

PACKAGE = "vllm.third_party.flash_linear_attention.ops"
CONVOLUTION = "vllm.model_executor.layers.mamba.ops.causal_conv1d"
FUNCTIONS = ("exp", "exp2", "log", "log2")
# Modules whose kernels use the number of a round as one of Triton's.
COUNTING = ("chunk_delta_h",)


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
    convolution: Any = sys.modules.get(CONVOLUTION)
    if convolution is not None and not isinstance(convolution._causal_conv1d_fwd_kernel, _EarlyGrid):
        convolution._causal_conv1d_fwd_kernel = _EarlyGrid(convolution._causal_conv1d_fwd_kernel)
    for name in COUNTING:
        if f"{PACKAGE}.{name}" in sys.modules:
            vars(sys.modules[f"{PACKAGE}.{name}"])["range"] = _counting


class _EarlyGrid:
    """A kernel whose grid is worked out from the caller's tensors, before the interpreter wraps them."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
        def launch(*arguments: Any, **named: Any) -> Any:
            given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
            sizes = grid(given)  # which may put other tensors into ``given``
            return self.kernel[sizes](**given)

        return launch


def _counting(*borders: Any) -> Iterator[Any]:
    """``range`` as in compiled kernels, whose numbers are Triton's own; interpreted, they are Python's."""
    import triton.language as tl

    for number in range(*(int(border) for border in borders)):
        yield tl.full((), number, tl.int32)


def _late(tl: Any, function: str) -> Callable[..., Any]:
    return lambda *arguments, **named: getattr(tl, function)(*arguments, **named)
