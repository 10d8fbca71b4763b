"""Decoding on the Triton kernels that vLLM brings; shapes as in `gearshift.serve.vllm.recurrent_ops`.

They update the states where they lie. Prompts go through the plain backend, which uses
flash-linear-attention's kernels on a GPU that has them.
"""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update
from vllm.third_party.flash_linear_attention.ops import fused_sigmoid_gating_delta_rule_update
from vllm.third_party.flash_linear_attention.ops.layernorm_guard import rmsnorm_fn

from gearshift.serve.vllm.guards import expect_signature
from gearshift.serve.vllm.recurrent_ops import DeltaGates, NaiveOps, RecurrentMetadata
from gearshift.supernet.ops.gated_norm import GatedRMSNorm

expect_signature(
    fused_sigmoid_gating_delta_rule_update, "A_log", "a", "b", "dt_bias", "q", "k", "v", "beta", "threshold"
)
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
        if not metadata.all_decode:
            return super().convolve(x_NC, weight_CK, bias_C, activation, inputs_PCK, metadata)
        kernel_activation = None if activation == "none" else activation
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
            return super().delta_rule(q_NGK, k_NGK, v_NHV, gates, memory_PHVK, metadata)
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
