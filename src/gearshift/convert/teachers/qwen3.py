"""Qwen3, the dense models."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3Config

from gearshift.convert.teachers.llama_like import LlamaLikeTeacher, windows_by_type
from gearshift.convert.teachers.qwen2 import qwen_config
from gearshift.supernet.mixer_configs import PROJECTIONS


class Qwen3Teacher(LlamaLikeTeacher):
    """Norms on query and key heads; windows as in Qwen2; ``attention_bias`` as in Llama."""

    config_class = Qwen3Config
    qk_norm = True

    def biases(self) -> tuple[str, ...]:
        """See :class:`LlamaLikeTeacher`."""
        return PROJECTIONS if self.filled.attention_bias else ()

    def layer_windows(self) -> tuple[int | None, ...]:
        """See :class:`~gearshift.convert.teachers.base.Teacher`."""
        return windows_by_type(self)

    def config_with_windows(self, windows: tuple[int | None, ...]) -> dict[str, Any] | None:
        """See :class:`~gearshift.convert.teachers.base.Teacher`."""
        return qwen_config(self.config, windows)
