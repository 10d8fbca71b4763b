"""The recurrent operations on the Triton kernels that vLLM brings; shapes as in `recurrent_ops`.

Decoding updates the states where they lie. Prompts, and steps that have some, go through the chunked forms,
all requests at once.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from vllm.third_party.flash_linear_attention.ops import (
    chunk_gated_delta_rule,
    fused_sigmoid_gating_delta_rule_update,
)
from vllm.third_party.flash_linear_attention.ops.kda import chunk_kda
from vllm.third_party.flash_linear_attention.ops.layernorm_guard import rmsnorm_fn
from vllm.v1.attention.backends.utils import compute_causal_conv1d_metadata

from gearshift.serve.vllm.guards import expect_signature
from gearshift.serve.vllm.recurrent_ops import DeltaGates, NaiveOps, RecurrentMetadata
from gearshift.supernet.ops.gated_norm import GatedRMSNorm

expect_signature(
    fused_sigmoid_gating_delta_rule_update, "A_log", "a", "b", "dt_bias", "q", "k", "v", "beta", "threshold"
)
expect_signature(chunk_gated_delta_rule, "q", "k", "v", "g", "beta", "scale", "initial_state")
expect_signature(chunk_kda, "q", "k", "v", "g", "beta", "scale", "initial_state")
expect_signature(
    causal_conv1d_fn,
    "x",
    "weight",
    "bias",
    "conv_states",
    "query_start_loc",
    "cache_indices",
    "has_initial_state",
    "activation",
)
expect_signature(compute_causal_conv1d_metadata, "query_start_loc_p_cpu", "device")
expect_signature(
    rmsnorm_fn, "x", "weight", "bias", "z", "eps", "group_size", "norm_before_gate", "activation"
)
expect_signature(
    causal_conv1d_update, "x", "conv_state", "weight", "bias", "activation", "conv_state_indices"
)


class KernelOps(NaiveOps):
    """See `RecurrentOps`."""

    def convolve(
        self,
        x_NC: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor | None,
        activation: str,
        inputs_PCK: Tensor,
        metadata: RecurrentMetadata,
    ) -> Tensor:
        """See `RecurrentOps`; the kernel writes its result over ``x``."""
        kernel_activation = None if activation == "none" else activation
        if not metadata.all_decode:
            convolved = causal_conv1d_fn(
                x_NC.T,
                weight_CK,
                bias_C,
                conv_states=inputs_PCK,
                query_start_loc=metadata.starts,
                cache_indices=metadata.pages.int(),
                has_initial_state=metadata.continued,
                activation=kernel_activation,
                metadata=metadata.once("convolution", _convolution_programs),
            )
            return convolved.T
        return causal_conv1d_update(
            x_NC, inputs_PCK, weight_CK, bias_C, kernel_activation, metadata.pages.int()
        )

    def delta_rule(
        self,
        q_NGK: Tensor,
        k_NGK: Tensor,
        v_NHV: Tensor,
        gates: DeltaGates,
        memory_PHVK: Tensor,
        metadata: RecurrentMetadata,
    ) -> Tensor:
        """See `RecurrentOps`. The kernel has one batch row, in which the requests follow each other.

        With decays for each channel it is right for one token a request only: its pointer to them moves on by
        heads instead of channels.
        """
        if not metadata.all_decode:
            return _chunked_rule(q_NGK, k_NGK, v_NHV, gates, memory_PHVK, metadata)
        out, _ = fused_sigmoid_gating_delta_rule_update(
            gates.a_log,
            gates.decay[None],
            gates.strength[None],
            gates.dt_bias,
            q_NGK[None],
            k_NGK[None],
            v_NHV[None],
            initial_state=memory_PHVK,
            inplace_final_state=True,
            cu_seqlens=metadata.starts,
            ssm_state_indices=metadata.pages,
            use_qk_l2norm_in_kernel=True,
            is_kda=gates.per_channel,
        )
        return out[0]

    def gated_norm(self, out_NHV: Tensor, gate_NHV: Tensor, norm: GatedRMSNorm) -> Tensor:
        """See `RecurrentOps`."""
        out, gate = (x.reshape(-1, x.shape[-1]) for x in (out_NHV, gate_NHV))
        normed = rmsnorm_fn(out, norm.weight, None, z=gate, eps=norm.eps, activation=norm.activation_name)
        return normed.view(out_NHV.shape)


def _convolution_programs(metadata: RecurrentMetadata) -> SimpleNamespace:
    """Which part of which request each program of the kernel takes, without a look at the device."""
    starts = torch.tensor([0, *itertools.accumulate(metadata.lengths)], dtype=torch.int32)
    counts, programs, offsets = compute_causal_conv1d_metadata(starts, device=metadata.starts.device)
    return SimpleNamespace(nums_dict=counts, batch_ptr=programs, token_chunk_offset_ptr=offsets)


def _chunked_rule(
    q_NGK: Tensor,
    k_NGK: Tensor,
    v_NHV: Tensor,
    gates: DeltaGates,
    memory_PHVK: Tensor,
    metadata: RecurrentMetadata,
) -> Tensor:
    if q_NGK.dtype == torch.float32:  # which the chunked kernels do not take
        return NaiveOps().delta_rule(q_NGK, k_NGK, v_NHV, gates, memory_PHVK, metadata)
    (g, beta), pages = gates.applied(), metadata.pages.long()
    before_RHVK = torch.where(metadata.continued[:, None, None, None], memory_PHVK[pages], 0).float()
    rule: Any = chunk_kda if gates.per_channel else chunk_gated_delta_rule
    out, after_RHVK = rule(
        *(x[None].contiguous() for x in (q_NGK, k_NGK, v_NHV, g, beta)),
        initial_state=before_RHVK,
        output_final_state=True,
        cu_seqlens=metadata.starts,
        use_qk_l2norm_in_kernel=True,
    )
    memory_PHVK[pages] = after_RHVK.to(memory_PHVK.dtype)
    return out[0]
