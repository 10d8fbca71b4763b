"""Decoding on the Triton kernels that vLLM brings; shapes as in `gearshift.serve.vllm.recurrent_ops`.

They update the states where they lie. Prompts go through the plain backend, which uses
flash-linear-attention's kernels on a GPU that has them.
"""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.layers.mamba.ops.causal_conv1d import causal_conv1d_update
from vllm.third_party.flash_linear_attention.ops import fused_recurrent_gated_delta_rule
from vllm.third_party.flash_linear_attention.ops.kda import fused_recurrent_kda

from gearshift.serve.vllm.guards import expect_signature
from gearshift.serve.vllm.recurrent_ops import NaiveOps, RecurrentMetadata

for _kernel in (fused_recurrent_gated_delta_rule, fused_recurrent_kda):
    expect_signature(_kernel, "q", "k", "v", "g", "beta", "scale", "initial_state", "inplace_final_state")
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
        g_NHx: Tensor,
        beta_NH: Tensor,
        memory_PHVK: Tensor,
        metadata: RecurrentMetadata,
    ) -> Tensor:
        """See `RecurrentOps`. The kernels have one batch row, in which the requests follow each other."""
        if not metadata.all_decode:
            return super().delta_rule(q_NGK, k_NGK, v_NHV, g_NHx, beta_NH, memory_PHVK, metadata)
        rule = fused_recurrent_kda if g_NHx.dim() == 3 else fused_recurrent_gated_delta_rule
        q, k, v, g, beta = (x[None].contiguous() for x in (q_NGK, k_NGK, v_NHV, g_NHx, beta_NH))
        out, _ = rule(
            q,
            k,
            v,
            g,
            beta,
            initial_state=memory_PHVK,
            inplace_final_state=True,
            cu_seqlens=metadata.starts,
            ssm_state_indices=metadata.pages.int(),  # pyright: ignore[reportArgumentType] - any integers
            use_qk_l2norm_in_kernel=True,
        )
        return out[0]
