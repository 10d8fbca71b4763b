"""The operations of a recurrent mixer on a batch of requests: the one point where backends part.

Letters: N tokens of the batch, R requests, C channels of the convolutions, P pages of states, G key heads, H
value heads, K key channels, V value channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from gearshift.supernet.mixers.recurrent import log_decay
from gearshift.supernet.ops.delta_rule import delta_rule
from gearshift.supernet.ops.gated_norm import GatedRMSNorm
from gearshift.supernet.ops.short_convolution import short_convolution


@dataclass(frozen=True)
class RecurrentMetadata:
    """The rows of a batch that one layer's recurrent mixer works on.

    Attributes:
        starts: borders of the requests among the tokens, (R + 1), int32.
        lengths: tokens of each request.
        pages: the page of each request's state, (R), integers.
        continued: whether the request has a state already, (R), bool; otherwise the page holds rubbish.
        all_decode: whether every request has a state and one more token.
        made: what `once` made, shared by all layers with these rows.
    """

    starts: Tensor
    lengths: tuple[int, ...]
    pages: Tensor
    continued: Tensor
    all_decode: bool
    made: dict[str, Any] = field(default_factory=dict, compare=False)

    def once(self, name: str, make: Callable[[RecurrentMetadata], Any]) -> Any:  # noqa: ANN401
        """What a backend makes of the rows once for all layers that work on them."""
        if name not in self.made:
            self.made[name] = make(self)
        return self.made[name]


@dataclass(frozen=True)
class DeltaGates:
    """How fast a state decays and how strongly a token writes, before their activations.

    Attributes:
        decay: (N, H), or (N, H, K) with a decay for each key channel.
        strength: (N, H).
        a_log: (H).
        dt_bias: (H), or (H * K).
    """

    decay: Tensor
    strength: Tensor
    a_log: Tensor
    dt_bias: Tensor

    @property
    def per_channel(self) -> bool:
        """Whether each key channel has a decay of its own."""
        return self.decay.dim() == 3

    def applied(self) -> tuple[Tensor, Tensor]:
        """Log decay in the shape of ``decay``, and write strength from 0 to 1."""
        a_log = self.a_log[:, None] if self.per_channel else self.a_log
        g = log_decay(a_log, self.decay, self.dt_bias.view(self.decay.shape[1:]))
        return g, self.strength.float().sigmoid()


class RecurrentOps(Protocol):
    """A backend. Convolution and delta rule read the states of the pages and leave the new ones there."""

    def convolve(
        self,
        x_NC: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor | None,
        activation: str,
        inputs_PCK: Tensor,
        metadata: RecurrentMetadata,
    ) -> Tensor:
        """The short causal convolutions and their activation, (N, C)."""
        ...

    def delta_rule(
        self,
        q_NGK: Tensor,
        k_NGK: Tensor,
        v_NHV: Tensor,
        gates: DeltaGates,
        memory_PHVK: Tensor,
        metadata: RecurrentMetadata,
    ) -> Tensor:
        """The delta rule, (N, H, V)."""
        ...

    def gated_norm(self, out_NHV: Tensor, gate_NHV: Tensor, norm: GatedRMSNorm) -> Tensor:
        """Each head normalised and gated, (N, H, V)."""
        ...


class NaiveOps:
    """Gearshift's own twins, in plain torch: slow, exact, on any device."""

    def convolve(
        self,
        x_NC: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor | None,
        activation: str,
        inputs_PCK: Tensor,
        metadata: RecurrentMetadata,
    ) -> Tensor:
        """See `RecurrentOps`."""
        outputs = []
        for row, x in enumerate(x_NC.split(list(metadata.lengths))):
            page = metadata.pages[row]
            before = torch.where(metadata.continued[row], inputs_PCK[page], 0.0)
            out, after = short_convolution(
                x[None], weight_CK, before.T[None], bias_C=bias_C, activation=activation
            )
            inputs_PCK[page] = after[0].T.to(inputs_PCK.dtype)
            outputs.append(out[0])
        return torch.cat(outputs)

    def delta_rule(
        self,
        q_NGK: Tensor,
        k_NGK: Tensor,
        v_NHV: Tensor,
        gates: DeltaGates,
        memory_PHVK: Tensor,
        metadata: RecurrentMetadata,
    ) -> Tensor:
        """See `RecurrentOps`."""
        lengths, (g_NHx, beta_NH) = list(metadata.lengths), gates.applied()
        rows = zip(*(x.split(lengths) for x in (q_NGK, k_NGK, v_NHV, g_NHx, beta_NH)), strict=True)
        outputs = []
        for row, inputs in enumerate(rows):
            q, k, v, g, beta = (x[None] for x in inputs)
            page = metadata.pages[row]
            before = torch.where(metadata.continued[row], memory_PHVK[page], 0.0).transpose(1, 2)[None]
            out, after = delta_rule(q, k, v, g, beta, before)
            memory_PHVK[page] = after[0].transpose(1, 2).to(memory_PHVK.dtype)
            outputs.append(out[0])
        return torch.cat(outputs)

    def gated_norm(self, out_NHV: Tensor, gate_NHV: Tensor, norm: GatedRMSNorm) -> Tensor:
        """See `RecurrentOps`."""
        return norm(out_NHV, gate_NHV)


def recurrent_ops(device: torch.device) -> RecurrentOps:
    """The backend for a device: vLLM's kernels on a GPU, the naive twins elsewhere."""
    if device.type == "cuda":
        from gearshift.serve.vllm.recurrent_kernels import KernelOps

        return KernelOps()
    return NaiveOps()
