r"""The naive twins of both delta rules: plain torch, any device, differentiable, float32 inside.

Per head, with state S of shape (K, V), write strength b_t, log decay g_t (arXiv 2412.06464 and 2510.26692):

    S_t = (I - b_t k_t k_t^T) Diag(exp g_t) S_{t-1} + b_t k_t v_t^T,        o_t = S_t^T q_t K^{-1/2}

g_t is one number a head for Gated DeltaNet and one number a key channel for Kimi Delta Attention; everything
else is the same, so one function serves both. q and k are L2-normalised here.

Shape letters: B batch, T tokens, H heads of values, G heads of queries and keys (H a multiple of G),
K key channels, V value channels, N chunks, C tokens of a chunk, D decay channels (1 or K).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

NORM_EPSILON = 1e-6
# Largest fall of the summed log decay in a chunk for which exp(fall / 2) is far from float32's limits.
SPLIT_RANGE = 80.0
# So few tokens are compared pair by pair, channel by channel.
FEW_TOKENS = 4


def recurrent_delta_rule(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTHx: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Token by token, as the equation reads. The fastest naive form for one token.

    Args:
        q_BTGK: queries before normalisation.
        k_BTGK: keys before normalisation.
        v_BTHV: values.
        g_BTHx: log decay <= 0, of shape (B, T, H) or (B, T, H, K).
        beta_BTH: write strength in [0, 1].
        state_BHKV: the state before the first token; None for zeros.

    Returns:
        Outputs (B, T, H, V) in v's dtype, and the float32 state after the last token (B, H, K, V).
    """
    q, k, v, decay, beta, state = _prepare(q_BTGK, k_BTGK, v_BTHV, g_BTHx, beta_BTH, state_BHKV)
    decay = decay.exp()
    outputs = []
    for t in range(q.shape[2]):
        state = state * decay[:, :, t, :, None]
        predicted = (k[:, :, t, None, :] @ state).squeeze(-2)
        write = (v[:, :, t] - predicted) * beta[:, :, t, None]
        state = state + k[:, :, t, :, None] * write[:, :, None, :]
        outputs.append((q[:, :, t, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, dim=1).to(v_BTHV.dtype), state


def chunk_delta_rule(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTHx: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The same function by chunks of ``chunk_size`` tokens: matrix products inside, a scan across.

    Within a chunk the writes w solve a unit lower triangular system (the WY form, arXiv 2406.06484). Decays
    enter only as exp(G_i - G_j) with i >= j, G the running sum of g, so nothing overflows however strong the
    decay; float32 leaves exp(G_i - G_j) a relative error of about 1e-7 times the fall of G in the chunk.

    Args and returns: see :func:`recurrent_delta_rule`.
    """
    tokens = q_BTGK.shape[1]
    q, k, v, g, beta, state = _prepare(q_BTGK, k_BTGK, v_BTHV, g_BTHx, beta_BTH, state_BHKV)
    # Padding tokens have g = 0 and beta = 0: they neither decay nor write.
    q, k, v, g, beta = (_split(x, chunk_size) for x in (q, k, v, g, beta[..., None]))
    total_BHNCD = g.cumsum(dim=3)
    system = beta * _decayed_scores(k, k, total_BHNCD)  # its diagonal is ignored: unitriangular
    inputs = torch.cat([beta * v, beta * k * total_BHNCD.exp()], dim=-1)
    solved = torch.linalg.solve_triangular(system, inputs, upper=False, unitriangular=True)
    own_writes, state_reads = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = _decayed_scores(q, k, total_BHNCD)
    q_state = q * total_BHNCD.exp()
    last = total_BHNCD[:, :, :, -1:]
    k_state = (k * (last - total_BHNCD).exp()).transpose(-1, -2)
    chunk_decay = last.exp().transpose(-1, -2)
    outputs = []
    for n in range(q.shape[2]):
        writes = own_writes[:, :, n] - state_reads[:, :, n] @ state
        outputs.append(q_state[:, :, n] @ state + scores[:, :, n] @ writes)
        state = state * chunk_decay[:, :, n] + k_state[:, :, n] @ writes
    out = torch.stack(outputs, dim=2).flatten(2, 3)[:, :, :tokens]
    return out.transpose(1, 2).to(v_BTHV.dtype), state


def l2_normalize(x: Tensor) -> Tensor:
    """Divide by sqrt(sum of squares + 1e-6) over the last dimension."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPSILON)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Heads first, at least float32, q and k normalised and repeated to v's heads; g gets its channels."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    heads = v.shape[2]
    q, k, v, g, beta = (x.transpose(1, 2).to(dtype) for x in (q, k, v, g, beta))
    q, k = (l2_normalize(x).repeat_interleave(heads // x.shape[1], dim=1) for x in (q, k))
    g = g if g.dim() == 4 else g[..., None]
    if state is None:
        state = v.new_zeros(v.shape[0], heads, k.shape[-1], v.shape[-1])
    return q * q.shape[-1] ** -0.5, k, v, g, beta, state.to(dtype)


def _split(x_BHTx: Tensor, chunk_size: int) -> Tensor:
    """(B, H, T, x) -> (B, H, N, C, x), zero-padded at the end."""
    padding = -x_BHTx.shape[2] % chunk_size
    return functional.pad(x_BHTx, (0, 0, 0, padding)).unflatten(2, (-1, chunk_size))


def _decayed_scores(rows_BHNCK: Tensor, columns_BHNCK: Tensor, total_BHNCD: Tensor) -> Tensor:
    """Sum over c of rows_ic columns_jc exp(G_ic - G_jc) for i >= j, else 0; shape (B, H, N, C, C)."""
    size = total_BHNCD.shape[3]
    above = torch.ones(size, size, dtype=torch.bool, device=total_BHNCD.device).triu(1)
    if total_BHNCD.shape[-1] == 1:
        total = total_BHNCD.squeeze(-1)
        decay = (total.unsqueeze(4) - total.unsqueeze(3)).masked_fill(above, float("-inf")).exp()
        return rows_BHNCK @ columns_BHNCK.transpose(-1, -2) * decay
    first, last = total_BHNCD[:, :, :, :1], total_BHNCD[:, :, :, -1:]
    if (first - last).max() < SPLIT_RANGE:
        # exp(G_i - G_j) = exp(G_i - m) exp(m - G_j): a matrix product, safe while neither factor overflows.
        middle = (first + last).detach() / 2
        rows = rows_BHNCK * (total_BHNCD - middle).exp()
        columns = columns_BHNCK * (middle - total_BHNCD).exp()
        return (rows @ columns.transpose(-1, -2)).masked_fill(above, 0.0)
    if size > FEW_TOKENS and size % 2 == 0:
        return _decayed_scores_by_halves(rows_BHNCK, columns_BHNCK, total_BHNCD)
    difference = total_BHNCD.unsqueeze(4) - total_BHNCD.unsqueeze(3)
    decay = difference.masked_fill(above[..., None], float("-inf")).exp()
    return torch.einsum("...ic,...jc,...ijc->...ij", rows_BHNCK, columns_BHNCK, decay)


def _decayed_scores_by_halves(rows_BHNCK: Tensor, columns_BHNCK: Tensor, total_BHNCD: Tensor) -> Tensor:
    """The same where decays are strong: each half of the tokens on its own, and late rows on early columns.

    With e the last early token, exp(G_i - G_j) = exp(G_i - G_e) exp(G_e - G_j) for these, and neither factor
    exceeds 1: a matrix product, where the whole would take a number for each pair of tokens and channel.
    """
    half = total_BHNCD.shape[3] // 2
    early_rows, late_rows = rows_BHNCK.split(half, dim=3)
    early_columns, late_columns = columns_BHNCK.split(half, dim=3)
    early, late = total_BHNCD.split(half, dim=3)
    edge = early[:, :, :, -1:]
    across = (late_rows * (late - edge).exp()) @ (early_columns * (edge - early).exp()).transpose(-1, -2)
    upper = _decayed_scores(early_rows, early_columns, early)
    lower = torch.cat([across, _decayed_scores(late_rows, late_columns, late)], dim=-1)
    return torch.cat([functional.pad(upper, (0, half)), lower], dim=-2)
