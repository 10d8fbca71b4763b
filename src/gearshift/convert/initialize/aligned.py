"""The default: mixers that start as near to the teacher's attention as its weights alone allow.

The delta rules take the teacher's projections, every query head with the key/value head it belongs to, and
start as plain readers of their memory:

- The convolutions pass the current token, scaled so that SiLU is nearly linear. The scale is free: q and k
  are L2-normalised afterwards and the output is RMS-normalised. Biases of the teacher's projections, times
  that scale, are the convolutions' biases, so they are kept exactly. Weights of query and key norms multiply
  the rows of the projections: what is left of such a norm behind the L2 norm is just its weight.
- The output gate starts half open in every channel (sigmoid of zero), never closed.
- The output projection undoes the RMS normalisation: it is the teacher's, each head times the size its values
  have on the average input. Its bias is dropped: a delta rule's output is normed and gated before its
  projection, so no weight gives it a constant part. (Of the supported families only Llama's
  ``attention_bias`` has such biases.)
- Decay does not depend on the input yet; its time scales are spread over the heads. So both delta rules
  compute the same at first.

Shape letters: D hidden size, H query heads, G key/value heads, K head size, N rows (H K), R rank, L taps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gearshift.convert.initialize.attention import Projection, TeacherAttention
from gearshift.convert.initialize.base import FOLDED_BIASES, copied_fields
from gearshift.placement import GATED_DELTA_NET, KIMI_DELTA_ATTENTION
from gearshift.supernet.config import SupernetConfig

# A convolution's inputs start at this root mean square: there SiLU bends by some 5 %. The epsilon of the L2
# norms behind it (1e-6) is negligible then; that of the output's norm (1e-5) is not: what a head reads weakly
# stays weak, and the loss of a converted model is the lower for it.
LINEAR_RANGE = 0.2
# Tokens after which a memory has faded to 1/e: the fastest and the slowest head.
TIME_SCALES = (8.0, 256.0)


class Readers(NamedTuple):
    """The three projections of H heads, each query head with its key and its value head."""

    q: Projection
    k: Projection
    v: Projection


@dataclass(frozen=True)
class Aligned:
    """See the module; an :class:`~gearshift.convert.initialize.base.Initializer`.

    The defaults are the recipe; each other value takes one idea out of it, for ablations.

    Attributes:
        pairing: query head h uses key/value head ``h // (H / G)``, as in the teacher, or ``h mod G``.
        biases: of the teacher's projections: ``folded`` into the convolutions, or ``dropped``.
        gate: ``open``: sigmoid of zero; ``closed``: SiLU of zero, so that the layer adds nothing.
        decay: time scales are ``spread``, or ``uniform``: their geometric mean everywhere.
        convolution: ``identity``, or ``random`` as torch makes a new one.
    """

    name: str = "aligned"
    pairing: Literal["grouped", "modulo"] = "grouped"
    biases: Literal["folded", "dropped"] = "folded"
    gate: Literal["open", "closed"] = "open"
    decay: Literal["spread", "uniform"] = "spread"
    convolution: Literal["identity", "random"] = "identity"

    def mixer_fields(self, mixer: str, attention_fields: Mapping[str, Any], window: int) -> dict[str, Any]:
        """See :class:`~gearshift.convert.initialize.base.Initializer`."""
        heads, head_dim = attention_fields["num_heads"], attention_fields["head_dim"]
        choices: dict[str, Any] = {"gate_activation": "sigmoid" if self.gate == "open" else "silu"}
        if self.biases == "folded" and set(FOLDED_BIASES) & set(attention_fields.get("biases", ())):
            choices["conv_bias"] = True
        if mixer == GATED_DELTA_NET:
            sizes = {"num_heads": heads, "num_key_heads": heads}
            return {**sizes, "key_head_dim": head_dim, "value_head_dim": head_dim, **choices}
        if mixer == KIMI_DELTA_ATTENTION:
            return {"num_heads": heads, "head_dim": head_dim, "gate_rank": head_dim, **choices}
        return copied_fields(mixer, attention_fields, window)

    def tensors(
        self,
        mixer: str,
        config: SupernetConfig,
        layer: int,
        attention: TeacherAttention,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """See :class:`~gearshift.convert.initialize.base.Initializer`."""
        sizes = config.mixer_config(mixer, layer)
        readers = self._readers(attention)
        taps = [self._taps(part, attention.norm, sizes.conv_kernel, generator) for part in readers]
        offsets = [tap.sum((1, 2)) * part.bias for tap, part in zip(taps, readers, strict=True)]
        output = _undoing_the_norm(attention, readers.v)
        if mixer == GATED_DELTA_NET:
            tensors = self._gated_delta_net(readers, output)
            tensors["conv1d.weight"] = torch.cat(taps)
            return tensors | ({"conv1d.bias": torch.cat(offsets)} if sizes.conv_bias else {})
        assert mixer == KIMI_DELTA_ATTENTION
        tensors = self._kimi_delta_attention(readers, output, sizes.gate_rank, generator)
        for part, tap, offset in zip("qkv", taps, offsets, strict=True):
            tensors[f"{part}_conv1d.weight"] = tap
            tensors |= {f"{part}_conv1d.bias": offset} if sizes.conv_bias else {}
        return tensors

    def _gated_delta_net(self, readers: Readers, output: Tensor) -> dict[str, Tensor]:
        """All but the convolution."""
        q, k, v = readers
        heads, hidden = len(v.weight) // v.head_dim, v.weight.shape[1]
        return {
            "in_proj_qkvz.weight": torch.cat([q.weight, k.weight, v.weight, torch.zeros_like(v.weight)]),
            "in_proj_ba.weight": torch.zeros(2 * heads, hidden),
            "A_log": torch.zeros(heads),
            "dt_bias": self._decay_bias(heads),
            "norm.weight": torch.ones(v.head_dim),
            "out_proj.weight": output,
        }

    def _kimi_delta_attention(
        self, readers: Readers, output: Tensor, rank: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """All but the convolutions; all channels of a head begin with its time scale."""
        size, hidden = readers.v.weight.shape
        head_dim = readers.v.head_dim
        heads = size // head_dim
        tensors = {f"{part}_proj.weight": reader.weight for part, reader in zip("qkv", readers, strict=True)}
        for gate in "fg":  # low rank: the inner projection random, the outer zero, so both can learn
            tensors[f"{gate}_a_proj.weight"] = torch.randn(rank, hidden, generator=generator) * hidden**-0.5
            tensors[f"{gate}_b_proj.weight"] = torch.zeros(size, rank)
        return {
            **tensors,
            "b_proj.weight": torch.zeros(heads, hidden),
            "A_log": torch.zeros(heads),
            "dt_bias": self._decay_bias(heads).repeat_interleave(head_dim),
            "o_norm.weight": torch.ones(head_dim),
            "o_proj.weight": output,
        }

    def _readers(self, attention: TeacherAttention) -> Readers:
        heads, groups = torch.arange(attention.num_heads), attention.num_key_value_heads
        own = heads // (len(heads) // groups) if self.pairing == "grouped" else heads % groups
        q, k, v = (attention.projection(name) for name in FOLDED_BIASES)
        if self.biases == "dropped":
            q, k, v = (part.without_bias() for part in (q, k, v))
        return Readers(q.scaled(attention.q_norm), k.scaled(attention.k_norm).select(own), v.select(own))

    def _taps(self, part: Projection, norm: Tensor, taps: int, generator: torch.Generator) -> Tensor:
        """Convolution weights (N, 1, L): only the last tap, at a scale where SiLU is nearly linear.

        One scale for all channels keeps the angles between queries and keys.
        """
        shape = (len(part.weight), 1, taps)
        if self.convolution == "random":
            return (2 * torch.rand(shape, generator=generator) - 1) * taps**-0.5
        weight = torch.zeros(shape)
        weight[:, :, -1] = LINEAR_RANGE / part.size(norm).square().mean().sqrt().clamp_min(1e-6)
        return weight

    def _decay_bias(self, heads: int) -> Tensor:
        """``dt_bias`` (H) for which, with A_log = 0, the logarithms of the time scales are evenly spread."""
        fastest, slowest = (math.log10(scale) for scale in TIME_SCALES)
        if self.decay == "uniform":
            fastest = slowest = (fastest + slowest) / 2
        scales = torch.logspace(fastest, slowest, heads)
        return torch.log(torch.expm1(1 / scales))  # inverse of softplus


def _undoing_the_norm(attention: TeacherAttention, v: Projection) -> Tensor:
    """The output projection (D, N), each head times the size that the norm takes from its values."""
    size_H = v.size(attention.norm).view(-1, v.head_dim).square().mean(1).sqrt()
    return (attention.o_proj.unflatten(1, (-1, v.head_dim)) * size_H[:, None]).flatten(1)
