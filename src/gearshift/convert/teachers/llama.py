"""Llama 1, 2, 3 and what shares its architecture."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from gearshift.convert.teachers.llama_like import LlamaLikeTeacher
from gearshift.convert.teachers.mistral import mistral_config
from gearshift.supernet.mixer_configs import PROJECTIONS


class LlamaTeacher(LlamaLikeTeacher):
    """All layers see everything; ``attention_bias`` gives all four projections a bias."""

    config_class = LlamaConfig

    def biases(self) -> tuple[str, ...]:
        """See :class:`LlamaLikeTeacher`."""
        return PROJECTIONS if self.filled.attention_bias else ()

    def mlp_bias(self) -> bool:
        """See :class:`LlamaLikeTeacher`."""
        return bool(self.filled.mlp_bias)

    def config_with_windows(self, windows: tuple[int | None, ...]) -> dict[str, Any] | None:
        """See :class:`~gearshift.convert.teachers.base.Teacher`; Mistral is Llama with windows."""
        return mistral_config(self, windows)
