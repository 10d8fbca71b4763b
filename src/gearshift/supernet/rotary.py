"""The rotary embedding of a mixer that cannot use the supernet's."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gearshift.supernet.mixer_configs import AttentionConfig, ConfigError

if TYPE_CHECKING:
    from gearshift.supernet.config import SupernetConfig


def own_rotary_embedding(
    config: SupernetConfig, mixer_config: AttentionConfig
) -> LlamaRotaryEmbedding | None:
    """A rotary embedding with the mixer's parameters and head size; None where the supernet's has both.

    Raises:
        ConfigError: Transformers has no such rotary embedding.
    """
    if mixer_config.rope_parameters is None and mixer_config.head_dim == config.head_dim:
        return None
    own = copy.copy(config)
    own.head_dim = mixer_config.head_dim
    own.rope_parameters = dict(mixer_config.rope_parameters or config.rope_parameters or {})
    own.standardize_rope_params()
    kind = own.rope_parameters["rope_type"]
    if kind not in ("default", *ROPE_INIT_FUNCTIONS):
        raise ConfigError(
            f"rope_parameters of a mixer has the rope_type {kind!r}; "
            f"expected one of default, {', '.join(ROPE_INIT_FUNCTIONS)}"
        )
    return LlamaRotaryEmbedding(own)  # pyright: ignore[reportArgumentType] - reads shared field names
