"""Both delta rules, by device: flash-linear-attention on a GPU, naive twins elsewhere."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from gearshift.supernet.ops.naive import chunk_delta_rule, recurrent_delta_rule

logger = logging.getLogger(__name__)

# Tokens in a chunk of the naive twins: on a CPU 64 is no faster and holds more, 16 is slower (docs/LAB.md).
CHUNK_TOKENS = 32
# Up to this many tokens the token-by-token form beats the set-up cost of a chunk on a CPU.
RECURRENT_TOKENS = 4

Kernel = Callable[..., tuple[Tensor, Tensor]]


def delta_rule(
    q_BTGK: Tensor,
    k_BTGK: Tensor,
    v_BTHV: Tensor,
    g_BTHx: Tensor,
    beta_BTH: Tensor,
    state_BHKV: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gated DeltaNet (g of shape (B, T, H)) or Kimi Delta Attention (g of shape (B, T, H, K)).

    Shapes and meaning as in :func:`gearshift.supernet.ops.naive.recurrent_delta_rule`. On a CUDA device the
    kernels of flash-linear-attention run when they are installed.
    """
    kernels = fla_kernels() if v_BTHV.is_cuda else None
    if kernels is None:
        return _naive(q_BTGK, k_BTGK, v_BTHV, g_BTHx, beta_BTH, state_BHKV)
    # fla's recurrent kernels have no backward.
    one_token = q_BTGK.shape[1] == 1 and not torch.is_grad_enabled()
    per_channel = g_BTHx.dim() == 4
    return kernels[per_channel, one_token](
        q_BTGK,
        k_BTGK,
        v_BTHV,
        g=g_BTHx.float(),
        beta=beta_BTH,
        initial_state=None if state_BHKV is None else state_BHKV.float(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )


def _naive(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    if q.shape[1] <= RECURRENT_TOKENS:
        return recurrent_delta_rule(q, k, v, g, beta, state)
    return chunk_delta_rule(q, k, v, g, beta, state, CHUNK_TOKENS)


@functools.cache
def fla_kernels() -> dict[tuple[bool, bool], Kernel] | None:
    """The fla kernels by (decay per channel, one token); None, its reason logged once, if there are none."""
    try:
        from fla.ops.gated_delta_rule import (  # pyright: ignore[reportMissingImports]
            chunk_gated_delta_rule,
            fused_recurrent_gated_delta_rule,
        )
        from fla.ops.kda import chunk_kda, fused_recurrent_kda  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        logger.warning(
            "delta rules run in plain torch on this GPU, slowly: %s; pip install 'gearshift[gpu]'", error
        )
        return None
    return {
        (False, False): chunk_gated_delta_rule,
        (False, True): fused_recurrent_gated_delta_rule,
        (True, False): chunk_kda,
        (True, True): fused_recurrent_kda,
    }
