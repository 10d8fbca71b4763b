"""What the mixers of one forward pass share: positions, attention masks, and where padding and documents lie.

Shape letters: B batch, T tokens of this call, S cached and new tokens, N rows, L longest row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gearshift.errors import GearshiftError


class BatchError(GearshiftError, ValueError):
    """The inputs of a forward pass do not fit together."""


@dataclass(frozen=True)
class Rows:
    """A batch laid out as one row a sequence, its tokens first and its padding last.

    Every causal mixer gives a sequence in such a row what it gives the sequence alone, and does not need to
    know of padding sides or documents.

    Attributes:
        index_NL: for each place of a row, its token in the flattened batch; 0 in the padding.
        valid_NL: which places hold a token.
        lengths_N: tokens in each row.
    """

    index_NL: Tensor
    valid_NL: Tensor
    lengths_N: Tensor

    def gather(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) -> (N, L, D)."""
        return x_BTD.flatten(0, 1)[self.index_NL]

    def scatter(self, y_NLD: Tensor, like_BTD: Tensor) -> Tensor:
        """(N, L, D) -> (B, T, D); places of the batch that are in no row become zero."""
        flat = y_NLD.new_zeros(like_BTD.shape[0] * like_BTD.shape[1], y_NLD.shape[-1])
        flat[self.index_NL[self.valid_NL]] = y_NLD[self.valid_NL]
        return flat.view(*like_BTD.shape[:2], -1)


def rows_of_mask(mask_BT: Tensor) -> Rows:
    """One row for each row of a padded batch, wherever its padding lies."""
    tokens = mask_BT.shape[1]
    order = mask_BT.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    lengths = mask_BT.sum(1)
    first = torch.arange(mask_BT.shape[0], device=mask_BT.device)[:, None] * tokens
    valid = torch.arange(tokens, device=mask_BT.device) < lengths[:, None]
    return Rows((order + first) * valid, valid, lengths)


def rows_of_documents(cu_seqlens: Tensor) -> Rows:
    """One row for each document of a packed batch of one; ``cu_seqlens`` holds 0 and every document's end."""
    starts, lengths = cu_seqlens[:-1], cu_seqlens.diff()
    places = torch.arange(int(lengths.max()), device=cu_seqlens.device)
    valid = places < lengths[:, None]
    return Rows((starts[:, None] + places) * valid, valid, lengths)


@dataclass
class SequenceContext:
    """Shared by all layers of one forward pass.

    Attributes:
        cos_sin: the supernet's rotary embeddings of the tokens' positions, each (B or 1, T, head_dim).
        past: tokens cached before this call.
        padding_mask_BS: true where a cached or new token counts; None when all do.
        padded_rows: the new tokens as rows, when some of them are padding.
        documents: the packed documents as rows, when the batch is packed.
        gaps: some padding has a token before it: a window counts tokens, which are not places then.
        positions_BT: the positions themselves, (B or 1, T), for mixers with a rotary embedding of their own.
    """

    cos_sin: tuple[Tensor, Tensor]
    past: int
    padding_mask_BS: Tensor | None = None
    padded_rows: Rows | None = None
    documents: Rows | None = None
    gaps: bool = False
    positions_BT: Tensor | None = None
    _masks: dict[tuple[int | None, int], Tensor | None] = field(default_factory=dict)

    @property
    def rows(self) -> Rows | None:
        """Rows for a mixer that wants no padding inside a sequence; None when the batch has none."""
        return self.documents if self.documents is not None else self.padded_rows

    def attention_mask(self, tokens: int, first_key: int, window: int | None) -> Tensor | None:
        """Which keys each query sees, (B or 1, 1, T, S'); None when plain causal masking, or none, is enough.

        Args:
            tokens: T, the queries of this call.
            first_key: position of the first key that the cache still holds.
            window: how many keys a query sees at most; None for all.
        """
        key = (window, first_key)
        if key not in self._masks:
            self._masks[key] = self._build_mask(tokens, first_key, window)
        return self._masks[key]

    def _build_mask(self, tokens: int, first_key: int, window: int | None) -> Tensor | None:
        keys = self.past + tokens - first_key
        windowed = window is not None and keys > window
        if self.padding_mask_BS is None and not windowed and (tokens == 1 or self.past == 0):
            return None
        device = self.cos_sin[0].device
        query = torch.arange(self.past, self.past + tokens, device=device)[:, None]
        key = torch.arange(first_key, first_key + keys, device=device)
        mask = key <= query
        if window is not None:
            mask &= query - key < window
        if self.padding_mask_BS is None:
            return mask[None, None]
        # A padding token sees itself, so that its softmax is defined and no NaN can reach a real token.
        visible = self.padding_mask_BS[:, None, first_key:] | (key == query)
        if window is not None and self.gaps:
            count = self.padding_mask_BS.cumsum(1)
            mask = (key <= query) & (count[:, self.past :, None] - count[:, None, first_key:] < window)
        return (mask & visible)[:, None]


def check_padding_mask(mask: Tensor, batch: int, past: int, tokens: int) -> Tensor:
    """The attention mask as booleans over cached and new tokens.

    Raises:
        BatchError: it has another shape.
    """
    if mask.shape != (batch, past + tokens):
        raise BatchError(
            f"attention_mask has shape {tuple(mask.shape)}; expected {(batch, past + tokens)}: "
            f"one entry for each of {past} cached and {tokens} new tokens"
        )
    return mask.bool()


def check_documents(cu_seqlens: Tensor, batch: int, tokens: int) -> Tensor:
    """The document borders of a packed batch.

    Raises:
        BatchError: the batch is not one row, or the borders do not rise from 0 to its length.
    """
    ends = cu_seqlens.tolist()
    rising = all(a < b for a, b in zip(ends, ends[1:], strict=False))
    if batch != 1 or len(ends) < 2 or ends[0] != 0 or ends[-1] != tokens or not rising:
        raise BatchError(
            f"cu_seqlens is {ends} for a batch of shape {(batch, tokens)}; "
            f"expected one row and rising borders from 0 to {tokens}"
        )
    return cu_seqlens.long()
