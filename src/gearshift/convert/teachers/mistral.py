"""Mistral 7B and what shares its architecture, such as Mistral Nemo and Apriel's text towers."""

from __future__ import annotations

from typing import Any

from transformers import MinistralConfig, MistralConfig

from gearshift.convert.teachers.llama_like import LlamaLikeTeacher, window_fields, windows_by_type

# How older configs, and programs that read only those, say what rope_parameters says.
OLDER_ROPE = ("rope_theta", "rope_scaling", "original_max_position_embeddings")


class MistralTeacher(LlamaLikeTeacher):
    """No biases; one ``sliding_window`` for all layers or, if it is null, none.

    A config without the key has a window of 4096, and one with ``layer_types`` is a Ministral, whose layers
    may differ; both as in Transformers.
    """

    config_class = MistralConfig

    def layer_windows(self) -> tuple[int | None, ...]:
        """See :class:`~gearshift.convert.teachers.base.Teacher`."""
        if getattr(self.filled, "layer_types", None):
            return windows_by_type(self)
        return (self.filled.sliding_window,) * self.filled.num_hidden_layers

    def config_with_windows(self, windows: tuple[int | None, ...]) -> dict[str, Any] | None:
        """See :class:`~gearshift.convert.teachers.base.Teacher`."""
        return mistral_config(self, windows)


class MinistralTeacher(MistralTeacher):
    """Ministral 8B: ``layer_types`` says which layers have the window; without it all have."""

    config_class = MinistralConfig


def mistral_config(teacher: LlamaLikeTeacher, windows: tuple[int | None, ...]) -> dict[str, Any] | None:
    """The config of a Mistral or, where layers differ, a Ministral like this teacher; both have no biases."""
    fields, shared = window_fields(windows), teacher.shared_fields()
    if fields is None or teacher.biases() or shared.pop("mlp_bias"):
        return None
    if len(set(windows)) == 1:
        del fields["layer_types"]
    name = "ministral" if "layer_types" in fields else "mistral"
    return {
        "model_type": name,
        "architectures": [f"{name.capitalize()}ForCausalLM"],
        **shared,
        "num_key_value_heads": teacher.attention_fields()["num_key_value_heads"],
        **{key: teacher.config[key] for key in OLDER_ROPE if teacher.config.get(key) is not None},
        **fields,
    }
