"""Llava around a Mistral text tower: Apriel-1.5-15b-Thinker, Apriel-1.6-15b-Thinker.

The text tower is converted; the vision tower and its projector are extra tensors. The text tower's tensors
are named ``language_model.model.…`` in files that Transformers writes, or ``model.language_model.…``, its
names in memory, in those of other tools.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from gearshift.convert.teachers.base import ConversionError
from gearshift.convert.teachers.llama_like import NEEDED, REFUSED
from gearshift.convert.teachers.mistral import MistralTeacher

TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
NAMED_AS_IN_MEMORY = ("model.language_model.", "model.vision_tower.", "model.multi_modal_projector.")
EXTRA = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


class LlavaTeacher(MistralTeacher):
    """The ``text_config`` of a Llava, which may leave out what equals Mistral's defaults."""

    has_extra = True

    def __init__(self, config: dict[str, Any], where: str, tensor_names: Collection[str] = ()) -> None:
        text = config.get("text_config")
        if not isinstance(text, dict) or text.get("model_type") != "mistral":
            kind = text.get("model_type") if isinstance(text, dict) else None
            raise ConversionError(
                f"{where} is a llava with a text_config of model_type {kind!r}; expected 'mistral'"
            )
        defaults = self.config_class()
        filled = {key: getattr(defaults, key) for key in NEEDED} | text
        outer = {key: config[key] for key in (*TOKEN_IDS, *REFUSED) if config.get(key) is not None}
        if config.get("tie_word_embeddings"):
            outer["tie_word_embeddings"] = True
        super().__init__(filled | outer, f"{where} (text_config)", tensor_names)

    def tensor_name(self, name: str) -> str:
        """See :class:`~gearshift.convert.teachers.llama_like.LlamaLikeTeacher`."""
        if any(known.startswith(NAMED_AS_IN_MEMORY) for known in self.tensor_names):
            return name.replace("model.", "model.language_model.", 1)
        return f"language_model.{name}"

    def extra_tensors(self, names: Iterable[str]) -> list[str]:
        """The vision tower and its projector."""
        return [name for name in names if name.startswith(EXTRA)]
