"""A supernet as a vLLM model: norms, FFNs and head over the whole batch, each mixer over its own rows.

Letters: N tokens of the batch, D channels of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from gearshift.placement import Placement
from gearshift.serve.vllm.attention import AttentionMixer
from gearshift.serve.vllm.delta_mixers import DeltaMixer, GatedDeltaNetMixer, KimiDeltaAttentionMixer
from gearshift.serve.vllm.feed_forward import feed_forward
from gearshift.serve.vllm.geometry import check_servable, demands, widest_window
from gearshift.serve.vllm.options import Options
from gearshift.serve.vllm.plugin import cache_types
from gearshift.serve.vllm.pool import SlotGroup
from gearshift.serve.vllm.rotary import TableRotaryEmbedding
from gearshift.serve.vllm.weights import load_weights
from gearshift.slot_layout import SlotLayout
from gearshift.supernet.config import SupernetConfig
from gearshift.supernet.mixer_configs import AttentionConfig, GatedDeltaNetConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class StepPlan:
    """Which rows of the batch each mixer of each layer works on.

    Attributes:
        rows: for each layer, the mixers that are used and the numbers of their tokens; None for all tokens.
        slot_mapping: for each attention by its prefix, where the new keys and values go.
        begin: what is to be done before the first layer, inside the step's graph; None for nothing.
    """

    rows: list[dict[str, Tensor | None]]
    slot_mapping: dict[str, Tensor] = field(default_factory=dict)
    begin: Callable[[], None] | None = None


class ServedLayer(nn.Module):
    """One decoder layer with all of its mixers."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: SupernetConfig,
        layer: int,
        rotaries: dict[str, TableRotaryEmbedding],
        prefix: str,
    ) -> None:
        super().__init__()
        self.mixers = nn.ModuleDict()
        for name in config.layer_mixer_names(layer):
            mixer, where = config.mixer_config(name, layer), f"{prefix}.mixers.{name}"
            self.mixers[name] = _served_mixer(vllm_config, config, mixer, rotaries, where)
        self.mlp = feed_forward(config.feed_forward_config(layer), f"{prefix}.mlp")
        assert config.hidden_size is not None
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_ND: Tensor,
        residual_ND: Tensor | None,
        positions_N: Tensor,
        rows: dict[str, Tensor | None],
    ) -> tuple[Tensor, Tensor]:
        """The FFN's output, and the residual stream that it is to be added to."""
        if residual_ND is None:
            residual_ND, normed = hidden_ND, self.input_layernorm(hidden_ND)
        else:
            normed, residual_ND = self.input_layernorm(hidden_ND, residual_ND)
        mixed = tensor_model_parallel_all_reduce(self._mix(normed, positions_N, rows))
        normed, stream_ND = self.post_attention_layernorm(mixed, residual_ND)
        return self.mlp(normed), stream_ND

    def _mix(self, normed_ND: Tensor, positions_N: Tensor, rows: dict[str, Tensor | None]) -> Tensor:
        """Each token's output from the mixer of its request."""
        mixed = None
        for name, tokens in rows.items():
            if tokens is None:
                return self.mixers[name](normed_ND, positions_N)
            if mixed is None:
                mixed = torch.zeros_like(normed_ND)
            mixed[tokens] = self.mixers[name](normed_ND[tokens], positions_N[tokens])
        assert mixed is not None
        return mixed


def _served_mixer(
    vllm_config: VllmConfig,
    config: SupernetConfig,
    mixer: Any,  # noqa: ANN401 - each mixer's own class
    rotaries: dict[str, TableRotaryEmbedding],
    prefix: str,
) -> nn.Module:
    if isinstance(mixer, AttentionConfig):
        return AttentionMixer(vllm_config, config, mixer, rotaries[_rotary_key(mixer)], prefix)
    device = torch.device(vllm_config.device_config.device_type)
    if isinstance(mixer, GatedDeltaNetConfig):
        return GatedDeltaNetMixer(config, mixer, prefix, device)
    return KimiDeltaAttentionMixer(config, mixer, prefix, device)


def _rotary_key(mixer: AttentionConfig) -> str:
    return f"{mixer.head_dim} {sorted((mixer.rope_parameters or {}).items())}"


def _rotaries(vllm_config: VllmConfig, config: SupernetConfig) -> dict[str, TableRotaryEmbedding]:
    """One table for each rotary embedding that the mixers have; most often one for all of them."""
    found: dict[str, TableRotaryEmbedding] = {}
    for layer in range(cast(int, config.num_hidden_layers)):
        for name in config.layer_mixer_names(layer):
            mixer = config.mixer_config(name, layer)
            if isinstance(mixer, AttentionConfig) and _rotary_key(mixer) not in found:
                positions = max(config.max_position_embeddings, vllm_config.model_config.max_model_len)
                found[_rotary_key(mixer)] = TableRotaryEmbedding(
                    config, mixer, positions, vllm_config.model_config.dtype
                )
    return found


def slot_layout(vllm_config: VllmConfig, config: SupernetConfig) -> SlotLayout:
    """The cut of the cache on each rank."""
    layers, block_tokens = cast(int, config.num_hidden_layers), vllm_config.cache_config.block_size
    ranks = vllm_config.parallel_config.tensor_parallel_size
    return SlotLayout.plan(
        demands(config, block_tokens, cache_types(vllm_config), ranks),
        layers=layers,
        block_tokens=block_tokens,
        slots=Options.read(vllm_config.additional_config).slots_for(layers),
        window=widest_window(config),
    )


class ServedModel(nn.Module):
    """Embeddings, layers and the final norm."""

    def __init__(self, vllm_config: VllmConfig, config: SupernetConfig, prefix: str) -> None:
        super().__init__()
        assert config.vocab_size is not None and config.hidden_size is not None
        assert config.num_hidden_layers is not None
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        rotaries = _rotaries(vllm_config, config)
        self.layers = nn.ModuleList(
            ServedLayer(vllm_config, config, layer, rotaries, f"{prefix}.layers.{layer}")
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class ServedSupernet(nn.Module):
    """What vLLM runs for the architecture ``SupernetForCausalLM``.

    Raises:
        UnservableError: the supernet has something that would be computed differently; it is named.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        assert isinstance(config, SupernetConfig)
        check_servable(config, vllm_config.parallel_config.tensor_parallel_size)
        self.config = config
        self.layout = slot_layout(vllm_config, config)
        self.slot_groups = [
            SlotGroup(vllm_config, self.layout, kind, index) for kind, index in self.layout.group_names()
        ]
        self.model = ServedModel(vllm_config, config, f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(cast(int, config.vocab_size), cast(int, config.hidden_size))
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(cast(int, config.vocab_size))
        default = Placement.parse(cast(str, config.placement))
        # Also the plan of vLLM's measuring runs, which have no requests.
        self.plan = StepPlan([{mixer: None} for mixer in default])

    @staticmethod
    def get_model_state_cls() -> type:
        """Asked by vLLM's model runner: who prepares the steps of this model."""
        from gearshift.serve.vllm.state import PlacementModelState

        return PlacementModelState

    def layers(self) -> Iterable[ServedLayer]:
        """The decoder layers, first layer first."""
        return cast(Iterable[ServedLayer], self.model.layers)

    def delta_mixers(self) -> Iterable[DeltaMixer]:
        """Every recurrent mixer."""
        return (m for layer in self.layers() for m in layer.mixers.values() if isinstance(m, DeltaMixer))

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """(N, D)."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: object = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The normed hidden states, (N, D)."""
        assert intermediate_tensors is None, "pipeline parallelism is refused when the engine starts"
        context = get_forward_context()
        if context.attn_metadata is not None:
            # vLLM has slots by group; with seats, each layer has its own.
            context.slot_mapping = self.plan.slot_mapping
        if self.plan.begin is not None:
            self.plan.begin()
        hidden = self.embed_input_ids(cast(Tensor, input_ids)) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer, rows in zip(self.layers(), self.plan.rows, strict=True):
            hidden, residual = layer(hidden, residual, positions, rows)
        return self.model.norm(hidden, residual)[0]

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(rows, vocabulary)."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Take a checkpoint's tensors, by the names of `gearshift.supernet`.

        Raises:
            CheckpointError: one is unknown or missing.
        """
        return load_weights(self, weights, tied=self.config.tie_word_embeddings)
