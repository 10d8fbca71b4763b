"""The vLLM plugin: one engine, one copy of the weights, and every request picks its placement.

vLLM finds `register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM about supernets. May be called again; uses no GPU.

    Raises:
        VllmVersionError: this vLLM's private interfaces are not those that the plugin was written for.
    """
    from gearshift.serve.vllm.plugin import register as register_with_vllm

    register_with_vllm()
