"""The platform plugin: vLLM's own CPU platform, on which the official wheel does not count itself."""

from __future__ import annotations

from typing import Any

from gearshift_rig import ops


class _Driver:
    """What Triton asks a driver before it interprets a kernel."""

    @staticmethod
    def is_active() -> bool:
        return True

    @staticmethod
    def get_benchmarker() -> Any:
        """For autotuning: here one way of running a kernel is as good as another."""
        return lambda kernel_call, quantiles: [1.0] * len(quantiles)


class _Backend:
    driver = _Driver


def activate() -> str:
    """Called by vLLM in every process; may be called again. Returns the platform's class by name."""
    ops.define()
    _give_triton_a_driver()
    return "vllm.platforms.cpu.CpuPlatform"


def _give_triton_a_driver() -> None:
    """Without an active driver vLLM replaces Triton by placeholders, and its model runner cannot work."""
    from triton.backends import backends

    known: dict[str, Any] = backends
    known.setdefault("cpu", _Backend)
