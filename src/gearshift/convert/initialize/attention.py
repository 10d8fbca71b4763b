"""The teacher's attention of one layer, as the initialisers read it.

Shape letters: D hidden size, H query heads, G key/value heads, K head size, N rows of a projection (H K or
G K).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gearshift.supernet.mixer_configs import PROJECTIONS

# Rows that are widened to float32 together: their memory is used again and again, not asked for anew.
ROWS = 512
# Most of their rows end up in the supernet as they are. Widened meanwhile, they would take twice the memory,
# and asking the system for it most of the time of making a mixer.
KEPT_AS_GIVEN = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


@dataclass(frozen=True)
class Projection:
    """Heads of queries, keys or values: ``y = weight x + bias``.

    Attributes:
        weight: (N, D), in any floating dtype of at most 32 bits.
        bias: (N); zeros where there is none.
        head_dim: K.
    """

    weight: Tensor
    bias: Tensor
    head_dim: int

    def select(self, heads: Tensor) -> Projection:
        """Some of the heads, in this order; a head may come several times."""
        weight, bias = (part.unflatten(0, (-1, self.head_dim))[heads] for part in (self.weight, self.bias))
        return Projection(weight.flatten(0, 1), bias.flatten(), self.head_dim)

    def scaled(self, factor_K: Tensor | None) -> Projection:
        """Every head's channels times these factors; unchanged for None."""
        if factor_K is None:
            return self
        factor = factor_K.repeat(len(self.weight) // self.head_dim)
        return Projection(self.weight * factor[:, None], self.bias * factor, self.head_dim)

    def without_bias(self) -> Projection:
        """The same with a bias of zero."""
        return Projection(self.weight, torch.zeros_like(self.bias), self.head_dim)

    def size(self, norm: Tensor) -> Tensor:
        """Expected root mean square of each channel (N).

        Behind a norm with this weight (D) the channels of x are taken as independent, of size one and mean
        zero before it.
        """
        squares = [rows_ND.float().square() @ norm.square() for rows_ND in self.weight.split(ROWS)]
        return (torch.cat(squares) + self.bias.square()).sqrt()


@dataclass(frozen=True)
class TeacherAttention:
    """One layer of the teacher, in float32 but for the weights of queries, keys and values.

    Attributes:
        q_proj: weight of the queries' projection, (H K, D); like the next two in the teacher's own dtype if
            that is narrower than float32.
        k_proj: the keys', (G K, D).
        v_proj: the values', (G K, D).
        o_proj: the output's, (D, H K).
        norm: weight of the norm before attention, (D).
        head_dim: K.
        biases: biases of these projections, by name; only those that the teacher has.
        q_norm: weight of the norm of each query head, (K); None if there is no such norm.
        k_norm: the same for key heads.
    """

    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    norm: Tensor
    head_dim: int
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], norm: Tensor, head_dim: int) -> TeacherAttention:
        """From a layer's tensors in any dtype, named as in ``Teacher.attention_tensors``."""
        given = {
            name: tensor if name in KEPT_AS_GIVEN and tensor.itemsize < 4 else tensor.float()
            for name, tensor in tensors.items()
        }
        return cls(
            *(given[f"{name}.weight"] for name in PROJECTIONS),
            norm=norm.float(),
            head_dim=head_dim,
            biases={name: given[f"{name}.bias"] for name in PROJECTIONS if f"{name}.bias" in given},
            q_norm=given.get("q_norm.weight"),
            k_norm=given.get("k_norm.weight"),
        )

    @property
    def num_heads(self) -> int:
        """Query heads, H."""
        return len(self.q_proj) // self.head_dim

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads, G."""
        return len(self.k_proj) // self.head_dim

    def projection(self, name: str) -> Projection:
        """``q_proj``, ``k_proj`` or ``v_proj`` with its bias."""
        weight: Tensor = getattr(self, name)
        bias = self.biases.get(name)
        return Projection(weight, torch.zeros(len(weight)) if bias is None else bias, self.head_dim)
