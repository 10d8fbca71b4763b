"""The cache of a supernet: for each layer the state of its placement's mixer; snapshot and rollback.

States never change a tensor that a snapshot may hold: recurrent states are replaced, key/value buffers are
only written behind their end. So a snapshot is a handful of references and costs no copy.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache

from gearshift.errors import GearshiftError
from gearshift.placement import Placement

TensorMap = Callable[[Tensor], Tensor]
# Room for so many tokens is added to a buffer at first.
SPARE_TOKENS = 64


class CacheError(GearshiftError, ValueError):
    """A cache is asked for something that it did not keep, or does not fit the call."""


class MixerState(ABC):
    """What one layer's mixer remembers of the tokens so far."""

    @abstractmethod
    def snapshot(self) -> Any:  # noqa: ANN401 - opaque, only given back to restore
        """The present state, as something :meth:`restore` takes."""

    @abstractmethod
    def restore(self, snapshot: Any) -> None:  # noqa: ANN401
        """Go back to a snapshot."""

    @abstractmethod
    def rollback(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens; at most ``max_rollback`` of them."""

    @abstractmethod
    def map_tensors(self, function: TensorMap) -> None:
        """Replace every tensor, batch first, by the function's result (to reorder or repeat the batch)."""


@dataclass(frozen=True)
class _KeyValueSnapshot:
    keys: Tensor | None
    values: Tensor | None
    begin: int
    end: int
    first: int


class KeyValueState(MixerState):
    """Keys and values (B, H, S, D) in a buffer that grows by doubling; a window keeps only its own tokens.

    Args:
        window: tokens that a query sees, itself among them; None for all.
        max_rollback: how many tokens beyond the window stay, so that they can be seen again after a rollback.
    """

    def __init__(self, window: int | None, max_rollback: int) -> None:
        self.window = window
        self.max_rollback = max_rollback
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._begin = 0  # where the oldest kept token lies in the buffer
        self._end = 0
        self._first = 0  # that token's position in the sequence

    def append(self, keys: Tensor, values: Tensor, gaps: bool = False) -> tuple[Tensor, Tensor, int]:
        """Store new tokens; return the keys and values they may see, and the first one's position.

        Args:
            keys: (B, H, T, D).
            values: (B, H, T, D).
            gaps: padding lies between tokens, so in some rows a window reaches further back than its size:
                nothing is forgotten.
        """
        past = self._first + self._end - self._begin
        new = keys.shape[2]
        self._make_room(keys, new)
        assert self._keys is not None and self._values is not None
        self._keys[:, :, self._end : self._end + new] = keys
        self._values[:, :, self._end : self._end + new] = values
        self._end += new
        visible = self._first
        if self.window is not None and not gaps:
            visible = max(self._first, past - self.window + 1)
        part = slice(self._begin + visible - self._first, self._end)
        result = self._keys[:, :, part], self._values[:, :, part], visible
        if not gaps:
            self._forget_old()
        return result

    def kept(self) -> tuple[Tensor, Tensor]:
        """The keys and values held at present; there must be some."""
        assert self._keys is not None and self._values is not None
        return self._keys[:, :, self._begin : self._end], self._values[:, :, self._begin : self._end]

    def _make_room(self, like: Tensor, new: int) -> None:
        """Move the kept tokens into a larger buffer when the new ones do not fit behind them."""
        if self._keys is None or self._end + new > self._keys.shape[2]:
            kept = self._end - self._begin
            self._move(like, (2 * kept if kept else SPARE_TOKENS) + new)

    def _move(self, like: Tensor, size: int) -> None:
        """Copy the kept tokens into a fresh buffer of ``size``; the old one stays as it is, for snapshots."""
        kept = self._end - self._begin
        fresh = [like.new_empty(*like.shape[:2], size, like.shape[3]) for _ in range(2)]
        if self._keys is not None and self._values is not None:
            fresh[0][:, :, :kept] = self._keys[:, :, self._begin : self._end]
            fresh[1][:, :, :kept] = self._values[:, :, self._begin : self._end]
        self._keys, self._values = fresh
        self._begin, self._end = 0, kept

    def _forget_old(self) -> None:
        if self.window is None:
            return
        limit = self.window - 1 + self.max_rollback
        surplus = self._end - self._begin - limit
        if surplus > 0:
            self._begin += surplus
            self._first += surplus
        assert self._keys is not None
        # When a long prompt came through, its memory is not held any longer.
        if self._keys.shape[2] > 4 * (limit + SPARE_TOKENS):
            self._move(self._keys, 2 * limit + SPARE_TOKENS)

    def snapshot(self) -> _KeyValueSnapshot:
        """See :meth:`MixerState.snapshot`."""
        return _KeyValueSnapshot(self._keys, self._values, self._begin, self._end, self._first)

    def restore(self, snapshot: _KeyValueSnapshot) -> None:
        """See :meth:`MixerState.restore`."""
        self._keys, self._values = snapshot.keys, snapshot.values
        self._begin, self._end, self._first = snapshot.begin, snapshot.end, snapshot.first

    def rollback(self, tokens: int) -> None:
        """See :meth:`MixerState.rollback`."""
        kept = self._end - self._begin - tokens
        # Tokens before the kept ones are gone; the next token must still find its whole window.
        if self.window is not None and self._first > 0 and kept < self.window - 1:
            raise CacheError(
                f"cannot roll back {tokens} tokens; this layer kept {kept + tokens - self.window + 1} behind "
                "its window (an earlier rollback took the others): take a snapshot before it instead"
            )
        assert kept >= 0
        self._end -= tokens

    def map_tensors(self, function: TensorMap) -> None:
        """See :meth:`MixerState.map_tensors`."""
        if self._keys is not None and self._values is not None:
            self._keys, self._values = function(self._keys), function(self._values)


class RecurrentState(MixerState):
    """Tensors that a recurrent mixer replaces at every step, and their values after each of the last tokens.

    Args:
        max_rollback: how many steps back :meth:`rollback` can go.
    """

    def __init__(self, max_rollback: int) -> None:
        self.max_rollback = max_rollback
        self.tensors: tuple[Tensor, ...] | None = None
        self._history: tuple[tuple[Tensor, ...] | None, ...] = (None,)

    def pieces(self, tokens: int) -> list[int]:
        """How to cut a call so that the state after each of the last ``max_rollback + 1`` tokens is seen."""
        singles = min(tokens, self.max_rollback)
        return [tokens - singles] * (tokens > singles) + [1] * singles

    def advance(self, tensors: tuple[Tensor, ...], tokens: int) -> None:
        """Take the state after ``tokens`` more tokens."""
        self.tensors = tensors
        # States inside a piece of several tokens were never seen, so nothing before it can be gone back to.
        kept = self._history if tokens == 1 else ()
        self._history = (*kept, tensors)[-(self.max_rollback + 1) :]

    def snapshot(self) -> tuple[tuple[Tensor, ...] | None, ...]:
        """See :meth:`MixerState.snapshot`."""
        return self._history

    def restore(self, snapshot: tuple[tuple[Tensor, ...] | None, ...]) -> None:
        """See :meth:`MixerState.restore`."""
        self._history = snapshot
        self.tensors = snapshot[-1]

    def rollback(self, tokens: int) -> None:
        """See :meth:`MixerState.rollback`."""
        if tokens >= len(self._history):
            raise CacheError(
                f"cannot roll back {tokens} tokens; this layer kept the states of the last "
                f"{len(self._history) - 1} (a padded batch or a longer call than max_rollback clears them): "
                "take a snapshot before it instead"
            )
        self.restore(self._history[: len(self._history) - tokens])

    def map_tensors(self, function: TensorMap) -> None:
        """See :meth:`MixerState.map_tensors`."""
        self._history = tuple(
            None if tensors is None else tuple(function(tensor) for tensor in tensors)
            for tensors in self._history
        )
        self.tensors = self._history[-1]


@dataclass(frozen=True)
class CacheSnapshot:
    """A moment of a cache that it can be restored to."""

    length: int
    rewrites: int
    states: tuple[Any, ...]


class SupernetCache(Cache):
    """The states of all layers under one placement.

    Args:
        states: one for each layer, made by the placement's mixers (``SupernetForCausalLM.new_cache``).
        placement: the placement that alone may use this cache.
        max_rollback: tokens that :meth:`rollback` can take back; recurrent layers keep as many older states.
    """

    def __init__(self, states: list[MixerState], placement: Placement, max_rollback: int = 0) -> None:
        # Transformers' own layers are not used: its base class makes this a cache that `generate` accepts.
        super().__init__(layers=[])
        self.states = states
        self.placement = placement
        self.max_rollback = max_rollback
        self.length = 0
        self._cuts: list[int] = []  # the length after every step back, oldest first

    def check_placement(self, placement: Placement) -> None:
        """Refuse a call with another placement.

        Raises:
            CacheError: the cache was filled under another placement.
        """
        if placement != self.placement:
            raise CacheError(
                f"this cache belongs to the placement '{self.placement}', the call uses '{placement}'; "
                "make a cache for each placement"
            )

    def snapshot(self) -> CacheSnapshot:
        """The present moment; costs no copy. Valid until the cache is cut below it."""
        states = tuple(state.snapshot() for state in self.states)
        return CacheSnapshot(self.length, len(self._cuts), states)

    def restore(self, snapshot: CacheSnapshot) -> None:
        """Go back to a snapshot.

        Raises:
            CacheError: tokens before the snapshot were taken back since, and may have been overwritten.
        """
        if any(length < snapshot.length for length in self._cuts[snapshot.rewrites :]):
            raise CacheError(
                f"this snapshot of {snapshot.length} tokens is no longer valid: "
                "the cache was cut below it since; take a new snapshot"
            )
        for state, saved in zip(self.states, snapshot.states, strict=True):
            state.restore(saved)
        self.length = snapshot.length
        self._cuts.append(self.length)

    def rollback(self, tokens: int) -> None:
        """Forget the last ``tokens`` tokens, as if they had never been seen.

        Raises:
            CacheError: more than ``max_rollback`` tokens, or more than there are.
        """
        if not 0 <= tokens <= min(self.max_rollback, self.length):
            raise CacheError(
                f"cannot roll back {tokens} tokens; expected 0 to {min(self.max_rollback, self.length)} "
                f"(max_rollback={self.max_rollback}, {self.length} tokens cached)"
            )
        before = self.snapshot()
        try:
            for state in self.states:
                state.rollback(tokens)
        except CacheError:
            for state, saved in zip(self.states, before.states, strict=True):
                state.restore(saved)
            raise
        self.length -= tokens
        self._cuts.append(self.length)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens cached so far, padding included."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the batch rows in another order (beam search)."""
        self._map_tensors(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row."""
        self._map_tensors(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some batch rows."""
        self._map_tensors(lambda tensor: tensor[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Transformers' name for :meth:`rollback`; takes a negative number of tokens."""
        self.rollback(-tokens_to_remove)

    def _map_tensors(self, function: TensorMap) -> None:
        for state in self.states:
            state.map_tensors(function)

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile the forward pass: no, the states change their shape."""
        return False

    def __repr__(self) -> str:
        return f"SupernetCache(placement={str(self.placement)!r}, length={self.length})"
