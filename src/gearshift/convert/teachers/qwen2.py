"""Qwen2, Qwen2.5 and what shares their architecture."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config

from gearshift.convert.teachers.llama_like import LlamaLikeTeacher, window_fields, windows_by_type


class Qwen2Teacher(LlamaLikeTeacher):
    """Biases on queries, keys and values; with ``use_sliding_window``, some layers have a window.

    Which ones, ``layer_types`` says or, in older configs, ``max_window_layers``: those from this one on.
    """

    config_class = Qwen2Config

    def biases(self) -> tuple[str, ...]:
        """See :class:`LlamaLikeTeacher`."""
        return ("q_proj", "k_proj", "v_proj")

    def layer_windows(self) -> tuple[int | None, ...]:
        """See :class:`~gearshift.convert.teachers.base.Teacher`."""
        return windows_by_type(self)

    def config_with_windows(self, windows: tuple[int | None, ...]) -> dict[str, Any] | None:
        """See :class:`~gearshift.convert.teachers.base.Teacher`."""
        return qwen_config(self.config, windows)


def qwen_config(config: dict[str, Any], windows: tuple[int | None, ...]) -> dict[str, Any] | None:
    """A Qwen's config with these windows in its layers."""
    fields = window_fields(windows)
    if fields is None:
        return None
    sliding = [layer for layer, window in enumerate(windows) if window is not None]
    # Programs that do not read layer_types look here: they find the first sliding layer, and vLLM's own
    # class refuses the model, as it must, where not all layers slide.
    first = sliding[0] if sliding else len(windows)
    return {**config, **fields, "use_sliding_window": bool(sliding), "max_window_layers": first}
