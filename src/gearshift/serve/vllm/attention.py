"""Full and sliding attention on vLLM's attention backends.

Letters: N tokens, D channels of the model, H query heads, G key/value heads, K channels of a head; heads are
those of one tensor-parallel rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.v1.kv_cache_interface import KVCacheSpec

from gearshift.serve.vllm.rotary import TableRotaryEmbedding
from gearshift.supernet.config import SupernetConfig
from gearshift.supernet.mixer_configs import AttentionConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# Where the weights of a checkpoint go: module, and the part of it that vLLM's loader knows by this name.
MERGED = {"q_proj": ("qkv_proj", "q"), "k_proj": ("qkv_proj", "k"), "v_proj": ("qkv_proj", "v")}


class PooledAttention(Attention):
    """vLLM's attention without memory of its own: its pages lie in the pool (`gearshift.serve.vllm.pool`)."""

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        """None: the slot groups ask for the memory."""
        return None


class AttentionMixer(nn.Module):
    """Grouped-query attention with a window, biases, norms of the heads and a rotary embedding as configured.

    The result is this rank's part of the sum over ranks, so that a layer adds up its mixers before it
    reduces.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: SupernetConfig,
        mixer: AttentionConfig,
        rotary: TableRotaryEmbedding,
        prefix: str,
    ) -> None:
        super().__init__()
        assert config.hidden_size is not None
        self.head_dim, self.rotary, self.window = mixer.head_dim, rotary, mixer.window
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            mixer.head_dim,
            mixer.num_heads,
            mixer.num_key_value_heads,
            bias=bool({"q_proj", "k_proj", "v_proj"} & set(mixer.biases)),
            prefix=f"{prefix}.qkv_proj",
        )
        if self.qkv_proj.bias is not None:
            # Some of the three may have none.
            self.qkv_proj.bias.data.zero_()
        self.o_proj = RowParallelLinear(
            mixer.num_heads * mixer.head_dim,
            config.hidden_size,
            bias="o_proj" in mixer.biases,
            skip_bias_add=True,
            reduce_results=False,
            prefix=f"{prefix}.o_proj",
        )
        self.q_norm = RMSNorm(mixer.head_dim, config.rms_norm_eps) if mixer.qk_norm else None
        self.k_norm = RMSNorm(mixer.head_dim, config.rms_norm_eps) if mixer.qk_norm else None
        heads, key_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.sizes = [heads * mixer.head_dim, key_heads * mixer.head_dim, key_heads * mixer.head_dim]
        self.attn = PooledAttention(
            heads,
            mixer.head_dim,
            mixer.head_dim**-0.5,
            num_kv_heads=key_heads,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=mixer.window,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x_ND: Tensor, positions_N: Tensor) -> Tensor:
        """This rank's part of the mixer's output, (N, D)."""
        q, k, v = self.qkv_proj(x_ND)[0].split(self.sizes, dim=-1)
        q, k = self.rotary(positions_N, _normed(self.q_norm, q), _normed(self.k_norm, k))
        out, bias = self.o_proj(self.attn(q, k, v.contiguous()))
        # In a sum over ranks, one of them brings the bias.
        return out if bias is None or get_tensor_model_parallel_rank() else out + bias


def _normed(norm: RMSNorm | None, x_NC: Tensor) -> Tensor:
    """Each head normalised, if at all; contiguous, as the rotary kernel wants it."""
    if norm is None:
        return x_NC.contiguous()
    heads = x_NC.unflatten(-1, (-1, norm.weight.shape[0])).contiguous()
    return norm(heads).flatten(1)
