"""One mixer of an ``apriel2`` config in the supernet's terms."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from gearshift.convert.apriel2.biases import biased
from gearshift.convert.apriel2.fields import Fields
from gearshift.convert.apriel2.rotary import rope_parameters
from gearshift.convert.teachers.base import ConversionError
from gearshift.placement import FULL_ATTENTION, GATED_DELTA_NET, KIMI_DELTA_ATTENTION, SLIDING_ATTENTION
from gearshift.supernet.mixer_configs import GATE_ACTIVATIONS

# The projections of attention, and the linear layers that the config calls them.
BIASES = {"q_proj": "query_layer", "k_proj": "key_layer", "v_proj": "value_layer", "o_proj": "dense_layer"}


@dataclass(frozen=True)
class StoredMixer:
    """A mixer of one layer of the checkpoint.

    Attributes:
        kind: the supernet's long name of its kind.
        prefix: what the names of its tensors begin with.
        fields: of the kind's configuration class; for all mixers of a kind the same keys.
    """

    kind: str
    prefix: str
    fields: dict[str, Any]


def read_mixer(fields: Fields, prefix: str, names: Collection[str]) -> StoredMixer:
    """Read the mixer whose tensors have this prefix, among tensors of these names.

    Raises:
        ConversionError: the supernet has no such mixer, or a value cannot be.
    """
    kind = fields.value("type")
    if not isinstance(kind, str) or kind not in READERS:
        fields.refuse("type", f"of the mixers that the format has, {', '.join(READERS)} can be converted")
    name, own = READERS[kind](fields, prefix, names)
    return StoredMixer(name, prefix, own)


def _read_attention(fields: Fields, prefix: str, names: Collection[str]) -> tuple[str, dict[str, Any]]:
    heads, head_dim = fields.count("heads"), fields.count("head_size")
    if head_dim % 2:
        fields.refuse("head_size", "expected an even number: rotary embeddings turn channels in pairs")
    if not fields.flag("causal", True):
        fields.refuse("causal", "a text's tokens see no later ones")
    window = fields.count("window_size") if fields.given.get("window_size") is not None else None
    own = {
        "num_heads": heads,
        "num_key_value_heads": _divisor(fields, "head_groups", fields.count("head_groups", heads), heads),
        "head_dim": head_dim,
        "biases": biased(fields, BIASES, prefix, names),
        "rope_parameters": rope_parameters(fields.inner("rotary")),
        "window": window,
    }
    return FULL_ATTENTION if window is None else SLIDING_ATTENTION, own


def _read_gated_delta_net(fields: Fields, prefix: str, names: Collection[str]) -> tuple[str, dict[str, Any]]:
    heads, convolution = fields.count("value_heads", 32), fields.inner("convolution_layer")
    # Absent means SiLU, null means none.
    bent = not convolution.has("activation") or convolution.given["activation"] is not None
    return GATED_DELTA_NET, {
        "num_heads": heads,
        "num_key_heads": _divisor(fields, "key_heads", fields.count("key_heads", 8), heads),
        "key_head_dim": fields.count("key_head_dim", 64),
        "value_head_dim": fields.count("value_head_dim", 64),
        "conv_kernel": convolution.count("kernel_size"),
        "conv_activation": convolution.choice("activation", ("silu",), "silu") if bent else "none",
        "gate_activation": "silu",
        "norm_eps": fields.number("norm_eps", 1e-5),
    }


def _read_kimi_delta_attention(
    fields: Fields, prefix: str, names: Collection[str]
) -> tuple[str, dict[str, Any]]:
    head_dim, norm = fields.count("head_dim", 64), fields.inner("normalization", optional=True)
    return KIMI_DELTA_ATTENTION, {
        "num_heads": fields.count("heads", 32),
        "head_dim": head_dim,
        "gate_rank": head_dim,
        # An activation here is ignored by every reader of the format: it is always SiLU.
        "conv_kernel": fields.inner("convolution_layer", optional=True).count("kernel_size", 4),
        "gate_activation": norm.choice("activation", GATE_ACTIVATIONS, "silu"),
        "norm_eps": norm.number("epsilon", 1e-5),
    }


def _divisor(fields: Fields, key: str, value: int, multiple: int) -> int:
    if multiple % value:
        raise ConversionError(f"{fields.where}: {key} {value} does not divide the {multiple} heads")
    return value


READERS = {
    "attention": _read_attention,
    "gdn": _read_gated_delta_net,
    "kda": _read_kimi_delta_attention,
}
