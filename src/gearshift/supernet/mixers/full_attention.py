"""Full attention: grouped queries, rotary positions, every token visible that the teacher's layer sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from gearshift.placement import FULL_ATTENTION
from gearshift.supernet.cache import KeyValueState, MixerState
from gearshift.supernet.config import AttentionConfig
from gearshift.supernet.context import SequenceContext
from gearshift.supernet.mixers.base import Mixer, register_mixer
from gearshift.supernet.rotary import own_rotary_embedding

if TYPE_CHECKING:
    from gearshift.supernet.config import SupernetConfig


@register_mixer(FULL_ATTENTION, short="fa")
class FullAttention(Mixer):
    """The teacher's attention, with the teacher's weights.

    Where the teacher's own layer has a window, so has this; where it has biases or norms of the heads, too.
    """

    config_class = AttentionConfig

    def __init__(self, config: SupernetConfig, mixer_config: AttentionConfig) -> None:
        super().__init__(config, mixer_config)
        assert config.hidden_size is not None
        self.head_dim = mixer_config.head_dim
        self.window = mixer_config.window
        query_size = mixer_config.num_heads * self.head_dim
        key_size = mixer_config.num_key_value_heads * self.head_dim
        biases = mixer_config.biases
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias="q_proj" in biases)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias="k_proj" in biases)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias="v_proj" in biases)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias="o_proj" in biases)
        self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if mixer_config.qk_norm else None
        self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps) if mixer_config.qk_norm else None
        self.rotary_emb = own_rotary_embedding(config, mixer_config)

    def forward(self, x_BTD: Tensor, context: SequenceContext, state: MixerState | None) -> Tensor:
        """See :meth:`Mixer.forward`. Padding is masked; documents become rows, which causality separates."""
        cos_sin = self._cos_sin(x_BTD, context)
        if context.documents is None:
            return self._attend(x_BTD, cos_sin, context, state)
        rows = context.documents
        cos_sin = (rows.gather(cos_sin[0]), rows.gather(cos_sin[1]))
        plain = SequenceContext(cos_sin, past=0)
        return rows.scatter(self._attend(rows.gather(x_BTD), cos_sin, plain, None), x_BTD)

    def _cos_sin(self, x_BTD: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        if self.rotary_emb is None:
            return context.cos_sin
        assert context.positions_BT is not None
        return self.rotary_emb(x_BTD, context.positions_BT)

    def _attend(
        self,
        x_BTD: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        context: SequenceContext,
        state: MixerState | None,
    ) -> Tensor:
        q, k = self._queries_and_keys(x_BTD, cos_sin)
        v = self._heads(self.v_proj, x_BTD)
        first_key = 0
        if state is not None:
            assert isinstance(state, KeyValueState)
            k, v, first_key = state.append(k, v, context.gaps)
        mask = context.attention_mask(x_BTD.shape[1], first_key, self.window)
        out = _attend_grouped(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def queries_and_keys(self, x_BTD: Tensor, context: SequenceContext) -> tuple[Tensor, Tensor]:
        """What a padded or plain batch's attention scores are made of: (B, H, T, K) and (B, G, T, K)."""
        return self._queries_and_keys(x_BTD, self._cos_sin(x_BTD, context))

    def _queries_and_keys(self, x_BTD: Tensor, cos_sin: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        q, k = self._heads(self.q_proj, x_BTD), self._heads(self.k_proj, x_BTD)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return apply_rotary_pos_emb(q, k, *cos_sin)

    def _heads(self, projection: nn.Linear, x_BTD: Tensor) -> Tensor:
        return projection(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def new_state(self, max_rollback: int) -> KeyValueState:
        """Keys and values of every token, or of the window."""
        return KeyValueState(self.window, max_rollback)


def _attend_grouped(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of grouped queries; without a mask causal, or all seen for T = 1."""
    if q_BHTK.shape[2] > 1:
        causal = mask is None
        return functional.scaled_dot_product_attention(
            q_BHTK, k_BGSK, v_BGSK, mask, is_causal=causal, enable_gqa=True
        )
    # One token: the queries of a group see the same keys, so they can pass as the tokens of one head, and the
    # keys need not be repeated for each of them (twice as fast on a CPU).
    q_BGRK = q_BHTK.view(*k_BGSK.shape[:2], -1, q_BHTK.shape[3])
    return functional.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK, mask).view_as(q_BHTK)
