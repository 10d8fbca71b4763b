"""What the delta-rule mixers share: padding and documents, short convolutions, states, rollback."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from gearshift.supernet.cache import MixerState, RecurrentState
from gearshift.supernet.context import Rows, SequenceContext
from gearshift.supernet.mixers.base import Mixer
from gearshift.supernet.ops.delta_rule import delta_rule
from gearshift.supernet.ops.short_convolution import short_convolution


class RecurrentMixer(Mixer):
    """A mixer that reads its tokens in order and remembers a state of fixed size.

    Subclasses say how a row of tokens becomes the inputs of the delta rule and its output. Padding and
    documents never reach them as such: they get rows whose padding, if any, comes last and does nothing.

    Attributes:
        conv_activation: ``silu`` or ``none``, of the short convolutions.
    """

    conv_activation: str = "silu"

    def forward(self, x_BTD: Tensor, context: SequenceContext, state: MixerState | None) -> Tensor:
        """See :meth:`Mixer.forward`."""
        rows = context.rows
        if rows is not None:
            mixed, tensors = self._mix(rows.gather(x_BTD), None if state is None else _tensors(state), rows)
            if state is not None:
                _recurrent(state).advance(tensors, x_BTD.shape[1] + 1)
            return rows.scatter(mixed, x_BTD)
        if state is None:
            return self._mix(x_BTD, None, None)[0]
        outputs = []
        for piece in x_BTD.split(_recurrent(state).pieces(x_BTD.shape[1]), dim=1):
            mixed, tensors = self._mix(piece, _tensors(state), None)
            _recurrent(state).advance(tensors, piece.shape[1])
            outputs.append(mixed)
        return torch.cat(outputs, dim=1)

    def _mix(
        self, x_BTD: Tensor, tensors: tuple[Tensor, ...] | None, rows: Rows | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One piece of tokens: convolve, decay, apply the delta rule, gate, project. Also the next state."""
        conv_state, memory = tensors if tensors is not None else (None, None)
        lengths = None if rows is None else rows.lengths_N
        weight, bias = self.convolution()
        qkv, conv_state = short_convolution(
            self.qkv(x_BTD), weight, conv_state, lengths, bias, self.conv_activation
        )
        q, k, v = self.split_heads(qkv)
        g, beta = self.decay_and_strength(x_BTD)
        if rows is not None:  # padding neither decays nor writes
            valid = rows.valid_NL[..., None]
            beta = beta * valid
            g = g * (valid if g.dim() == 3 else valid[..., None])
        out, memory = delta_rule(q, k, v, g, beta, memory)
        return self.output(out, x_BTD), (conv_state, memory)

    @abstractmethod
    def qkv(self, x_BTD: Tensor) -> Tensor:
        """The convolutions' inputs, (B, T, C)."""

    @abstractmethod
    def convolution(self) -> tuple[Tensor, Tensor | None]:
        """One filter for each of those channels, (C, taps), and their biases (C) if they have any."""

    @abstractmethod
    def split_heads(self, qkv_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys (B, T, G, K) and values (B, T, H, V) from the convolved channels."""

    @abstractmethod
    def decay_and_strength(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay, (B, T, H) or (B, T, H, K), and write strength (B, T, H)."""

    @abstractmethod
    def output(self, out_BTHV: Tensor, x_BTD: Tensor) -> Tensor:
        """Gate, normalise and project the delta rule's output to (B, T, D)."""

    def new_state(self, max_rollback: int) -> RecurrentState:
        """Convolution inputs (B, taps - 1, C) and memory (B, H, K, V)."""
        return RecurrentState(max_rollback)


def log_decay(a_log: Tensor, x: Tensor, dt_bias: Tensor) -> Tensor:
    """-exp(A_log) softplus(x + dt_bias), in float32; the shapes broadcast."""
    return -a_log.float().exp() * functional.softplus(x.float() + dt_bias.float())


def _recurrent(state: MixerState) -> RecurrentState:
    assert isinstance(state, RecurrentState)
    return state


def _tensors(state: MixerState) -> tuple[Tensor, ...] | None:
    return _recurrent(state).tensors
