"""The supernet's config of an ``apriel2`` checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gearshift.convert.apriel2.fields import Fields
from gearshift.convert.apriel2.layers import StoredLayer, final_epsilon
from gearshift.convert.apriel2.mixers import StoredMixer
from gearshift.placement import (
    FULL_ATTENTION,
    GATED_DELTA_NET,
    KIMI_DELTA_ATTENTION,
    SLIDING_ATTENTION,
    Placement,
)
from gearshift.supernet.config import SupernetConfig

# For models in which nothing has positions.
NO_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# The first of these that a model holds gives its head count and, in this field, its head size.
HEAD_SIZES = {
    FULL_ATTENTION: "head_dim",
    SLIDING_ATTENTION: "head_dim",
    GATED_DELTA_NET: "value_head_dim",
    KIMI_DELTA_ATTENTION: "head_dim",
}
Mixers = dict[str, dict[str, Any]]


def supernet_config(config: Fields, layers: Sequence[StoredLayer], ids: dict[str, Any]) -> SupernetConfig:
    """The config of a supernet of these layers.

    Args:
        config: the checkpoint's ``config.json``.
        layers: what it holds.
        ids: the ids of its special tokens.

    Raises:
        ConversionError: a value cannot be.
    """
    leading = _leading(layers)
    rope = leading.fields.get("rope_parameters", NO_ROPE)
    return SupernetConfig(
        vocab_size=config.count("vocab_size", 32000),
        hidden_size=config.count("hidden_size", 4096),
        num_hidden_layers=len(layers),
        num_attention_heads=leading.fields["num_heads"],
        head_dim=leading.fields[HEAD_SIZES[leading.kind]],
        rope_parameters=dict(rope),
        rms_norm_eps=final_epsilon(config),
        max_position_embeddings=config.inner("embeddings", optional=True).count(
            "max_position_embeddings", 2048
        ),
        tie_word_embeddings=config.flag("tie_word_embeddings", False),
        placement=str(Placement(tuple(layer.main for layer in layers))),
        architectures=["SupernetForCausalLM"],
        **_ffn_fields(layers),
        **_mixer_fields(layers, rope),
        **ids,
    )


def _leading(layers: Sequence[StoredLayer]) -> StoredMixer:
    held = [layer.mixers[kind] for kind in HEAD_SIZES for layer in layers if kind in layer.mixers]
    return held[0]


def _ffn_fields(layers: Sequence[StoredLayer]) -> dict[str, Any]:
    """The first layer's fields, and ``layer_ffns`` where others differ."""
    common = layers[0].ffn
    own = [_differing(layer.ffn, common) for layer in layers]
    return {**common, "layer_ffns": own if any(own) else None}


def _mixer_fields(layers: Sequence[StoredLayer], rope: dict[str, Any]) -> dict[str, Any]:
    """``mixers``, and ``layer_mixers`` where layers differ."""
    held = [{kind: _own_fields(mixer, rope) for kind, mixer in layer.mixers.items()} for layer in layers]
    # The first layer that holds a mixer says what is common.
    common = {kind: fields for mixers in reversed(held) for kind, fields in mixers.items()}
    own = [{kind: _differing(mixers[kind], common[kind]) for kind in mixers} for mixers in held]
    alike = all(mixers == dict.fromkeys(common, {}) for mixers in own)
    spelled = {
        kind: {k: v for k, v in fields.items() if v not in (None, [])} for kind, fields in common.items()
    }
    return {"mixers": spelled, "layer_mixers": None if alike else own}


def _own_fields(mixer: StoredMixer, rope: dict[str, Any]) -> dict[str, Any]:
    """The mixer's fields, without a rotary embedding that is the model's."""
    if mixer.fields.get("rope_parameters") != rope:
        return mixer.fields
    return {**mixer.fields, "rope_parameters": None}


def _differing(fields: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value != common[key]}
