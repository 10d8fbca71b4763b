"""The two operations of a recurrent mixer on a batch of requests: the one point where backends part.

Letters: N tokens of the batch, R requests, C channels of the convolutions, P pages of states, G key heads, H
value heads, K key channels, V value channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gearshift.supernet.ops.delta_rule import delta_rule
from gearshift.supernet.ops.short_convolution import short_convolution


@dataclass(frozen=True)
class RecurrentMetadata:
    """The rows of a batch that one layer's recurrent mixer works on.

    Attributes:
        starts: borders of the requests among the tokens, (R + 1), int32.
        lengths: tokens of each request.
        pages: the page of each request's state, (R), int64.
        continued: whether the request has a state already, (R), bool; otherwise the page holds rubbish.
        all_decode: whether every request has a state and one more token.
    """

    starts: Tensor
    lengths: tuple[int, ...]
    pages: Tensor
    continued: Tensor
    all_decode: bool


class RecurrentOps(Protocol):
    """A backend. Both operations read the states of the pages and leave the new ones there."""

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
        g_NHx: Tensor,
        beta_NH: Tensor,
        memory_PHVK: Tensor,
        metadata: RecurrentMetadata,
    ) -> Tensor:
        """The delta rule with decay a head, g (N, H), or a channel, (N, H, K); returns (N, H, V)."""
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
        g_NHx: Tensor,
        beta_NH: Tensor,
        memory_PHVK: Tensor,
        metadata: RecurrentMetadata,
    ) -> Tensor:
        """See `RecurrentOps`."""
        lengths = list(metadata.lengths)
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


def recurrent_ops(device: torch.device) -> RecurrentOps:
    """The backend for a device: vLLM's kernels on a GPU, the naive twins elsewhere."""
    if device.type == "cuda":
        from gearshift.serve.vllm.recurrent_kernels import KernelOps

        return KernelOps()
    return NaiveOps()
