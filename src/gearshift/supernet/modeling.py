"""The supernet as a Transformers model: Llama's shared parts around layers that hold several mixers.

With every layer on ``full_attention`` it computes what the teacher computes. Norms, gated FFN and rotary
embeddings are Transformers' own Llama modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from gearshift.placement import Placement, PlacementSpace
from gearshift.supernet.cache import CacheError, MixerState, SupernetCache
from gearshift.supernet.config import SupernetConfig
from gearshift.supernet.context import (
    BatchError,
    SequenceContext,
    check_documents,
    check_padding_mask,
    rows_of_documents,
    rows_of_mask,
)
from gearshift.supernet.feed_forward import feed_forward
from gearshift.supernet.mixers import MIXER_CLASSES, Mixer

PlacementLike = Placement | str | list[str]


@dataclass
class SupernetOutput(CausalLMOutputWithPast):
    """Transformers' output and, when asked for, each layer's mixer output before its residual addition.

    Attributes:
        mixer_outputs: one tensor (B, T, D) for each layer.
    """

    mixer_outputs: tuple[Tensor, ...] | None = None


class SupernetLayer(nn.Module):
    """One decoder layer: one of each mixer that it holds, one FFN, two norms."""

    def __init__(self, config: SupernetConfig, layer: int) -> None:
        super().__init__()
        assert config.mixers is not None
        held = config.layer_mixer_names(layer)
        self.mixers = nn.ModuleDict(
            {
                name: MIXER_CLASSES[name](config, config.mixer_config(name, layer))
                for name in config.mixers
                if name in held
            }
        )
        self.mlp = feed_forward(config.feed_forward_config(layer))
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, hidden_BTD: Tensor, mixer: str, context: SequenceContext, state: MixerState | None
    ) -> tuple[Tensor, Tensor]:
        """Run one mixer and the FFN; returns the layer's output and the mixer's output."""
        mixed = self.mixers[mixer](self.input_layernorm(hidden_BTD), context, state)
        hidden_BTD = hidden_BTD + mixed
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD)), mixed


class SupernetPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config_class = SupernetConfig
    base_model_prefix = "model"
    _no_split_modules = ["SupernetLayer"]  # noqa: RUF012 - Transformers' own convention
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mixer):
            module.initialize()


class SupernetModel(SupernetPreTrainedModel):
    """Embeddings, layers and the final norm."""

    def __init__(self, config: SupernetConfig) -> None:
        super().__init__(config)
        assert config.vocab_size is not None and config.hidden_size is not None
        assert config.num_hidden_layers is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [SupernetLayer(config, layer) for layer in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # pyright: ignore[reportArgumentType] - reads shared field names
        self.post_init()

    def forward(
        self,
        embeddings_BTD: Tensor,
        placement: Placement | Sequence[str],
        context: SequenceContext,
        cache: SupernetCache | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run every layer's mixer of the placement.

        Returns:
            The normed hidden states (B, T, D), and every layer's mixer output.
        """
        hidden = embeddings_BTD
        states = [None] * len(self.layers) if cache is None else cache.states
        mixer_outputs = []
        for layer, mixer, state in zip(self.layers, placement, states, strict=True):
            hidden, mixed = layer(hidden, mixer, context, state)
            mixer_outputs.append(mixed)
        return self.norm(hidden), tuple(mixer_outputs)


class SupernetForCausalLM(SupernetPreTrainedModel, GenerationMixin):
    """A supernet with its language-model head; ``generate`` works with any placement.

    The placement of a call is its ``placement=`` argument, else the one given to :meth:`set_placement`, else
    the one in the config. Mixers that the placement does not use take no part in the call.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SupernetConfig) -> None:
        super().__init__(config)
        assert config.vocab_size is not None and config.hidden_size is not None
        self._placement_space = config.placement_space
        self.model = SupernetModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.set_placement(str(config.placement))
        self.post_init()

    @property
    def placement_space(self) -> PlacementSpace:
        """Every placement this model can run."""
        return self._placement_space

    @property
    def placement(self) -> Placement:
        """The placement used when a call names none."""
        return self._placement

    def set_placement(self, placement: PlacementLike) -> None:
        """Use this placement from now on.

        Raises:
            PlacementError: it does not fit the layers and mixers.
        """
        self._placement = self._checked(placement)

    def _checked(self, placement: PlacementLike | None) -> Placement:
        if placement is None:
            return self._placement
        return self.placement_space.check(Placement.of(placement, self.config.num_hidden_layers))

    def new_cache(self, placement: PlacementLike | None = None, max_rollback: int = 0) -> SupernetCache:
        """An empty cache for a placement.

        Args:
            placement: the only placement that may use it.
            max_rollback: how many tokens ``rollback`` can take back.
        """
        checked = self._checked(placement)
        layers = zip(self.model.layers, checked, strict=True)
        states = [_mixer(layer, name).new_state(max_rollback) for layer, name in layers]
        return SupernetCache(states, checked, max_rollback)

    def begin(self, input_ids: Tensor) -> tuple[Tensor, SequenceContext]:
        """Embeddings (B, T, D) of tokens (B, T) without padding or cache, and what their layers share.

        With :meth:`run_layer` it lets placements that begin alike share these layers.
        """
        embeddings = self.model.embed_tokens(input_ids)
        return embeddings, self._context(embeddings, 0, None, None, None)

    def run_layer(self, layer: int, hidden_BTD: Tensor, mixer: str, context: SequenceContext) -> Tensor:
        """One layer's output (B, T, D) with one of its mixers, without a cache."""
        return self.model.layers[layer](hidden_BTD, mixer, context, None)[0]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        placement: PlacementLike | None = None,
        cu_seqlens: Tensor | None = None,
        output_mixer_outputs: bool = False,
        **kwargs: Any,  # noqa: ANN401 - Transformers' generate passes what it has
    ) -> SupernetOutput:
        """Run the model under one placement.

        Args:
            input_ids: tokens (B, T).
            attention_mask: (B, cached + T), false where a token is padding, on either side.
            position_ids: (B or 1, T); by default each sequence counts its own tokens from 0.
            past_key_values: a cache made by :meth:`new_cache` for the same placement.
            inputs_embeds: (B, T, D) in place of ``input_ids``.
            labels: (B, T), -100 where no loss is wanted; shifted inside.
            use_cache: make a cache if none is given.
            logits_to_keep: only the last so many positions, or these positions, get logits; 0 for all.
            placement: the placement of this call.
            cu_seqlens: (N + 1) borders of the documents of a packed batch (B = 1); each gets what it gets
                alone.
            output_mixer_outputs: also return every layer's mixer output.
            **kwargs: passed to the loss function.

        Raises:
            BatchError: inputs that do not fit together.
            CacheError: a cache of another placement, or not of this class.
            PlacementError: the placement does not fit.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise BatchError("give exactly one of input_ids and inputs_embeds")
        embeddings = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        checked = self._checked(placement)
        cache = self._cache_for(past_key_values, checked, bool(use_cache))
        past = 0 if cache is None else cache.length
        context = self._context(embeddings, past, attention_mask, position_ids, cu_seqlens)
        if cache is not None and context.documents is not None:
            raise BatchError("a packed batch cannot be cached; run its documents as a padded batch instead")
        hidden, mixer_outputs = self.model(embeddings, checked, context, cache)
        if cache is not None:
            cache.length += embeddings.shape[1]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return SupernetOutput(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            mixer_outputs=mixer_outputs if output_mixer_outputs else None,
        )

    def hidden_states(
        self, input_ids: Tensor, placement: Sequence[str], cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """What training needs of a forward pass, without logits, which would be by far its largest tensor.

        Args:
            input_ids: tokens (B, T).
            placement: for each layer the name of one of its ``mixers``.
            cu_seqlens: borders of the documents of a packed batch, as in :meth:`forward`.

        Returns:
            The normed hidden states (B, T, D) that the head reads, and every layer's mixer output.
        """
        embeddings = self.model.embed_tokens(input_ids)
        context = self._context(embeddings, 0, None, None, cu_seqlens)
        return self.model(embeddings, placement, context, None)

    def _cache_for(self, given: Cache | None, placement: Placement, use_cache: bool) -> SupernetCache | None:
        if given is None:
            return self.new_cache(placement) if use_cache else None
        if not isinstance(given, SupernetCache):
            raise CacheError(
                f"past_key_values is a {type(given).__name__}; expected one made by model.new_cache(...)"
            )
        given.check_placement(placement)
        return given

    def _context(
        self,
        embeddings: Tensor,
        past: int,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> SequenceContext:
        batch, tokens, _ = embeddings.shape
        device = embeddings.device
        cu_seqlens = _documents(cu_seqlens, position_ids, attention_mask, past, batch)
        padding = None
        if attention_mask is not None:
            padding = check_padding_mask(attention_mask, batch, past, tokens)
            padding = None if bool(padding.all()) else padding
        documents = None
        if cu_seqlens is not None:
            cu_seqlens = check_documents(cu_seqlens, batch, tokens).to(device)
            documents = rows_of_documents(cu_seqlens) if len(cu_seqlens) > 2 else None
        if position_ids is None:
            position_ids = _positions(past, tokens, padding, cu_seqlens, device)
        new = None if padding is None else padding[:, past:]
        padded_rows = None if new is None or bool(new.all()) else rows_of_mask(new)
        cos_sin = self.model.rotary_emb(embeddings, position_ids)
        gaps = padding is not None and bool((padding[:, :-1] & ~padding[:, 1:]).any())
        return SequenceContext(cos_sin, past, padding, padded_rows, documents, gaps, position_ids)

    def _prepare_cache_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest is not needed
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: object,
    ) -> None:
        """Called by ``generate``: make our cache, for the call's placement, in place of Transformers'."""
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = self.new_cache(model_kwargs.get("placement"))


def _mixer(layer: nn.Module, name: str) -> Mixer:
    assert isinstance(layer, SupernetLayer)
    mixer = layer.mixers[name]
    assert isinstance(mixer, Mixer)
    return mixer


def _documents(
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    past: int,
    batch: int,
) -> Tensor | None:
    """The given borders, or those where positions start again, as in Transformers' flattened batches."""
    if attention_mask is not None and cu_seqlens is not None:
        raise BatchError("give attention_mask (a padded batch) or cu_seqlens (a packed one), not both")
    if cu_seqlens is not None or position_ids is None or attention_mask is not None or past or batch != 1:
        return cu_seqlens
    positions = position_ids.flatten()
    starts = (positions.diff() <= 0).nonzero().flatten() + 1
    borders = [positions.new_zeros(1), starts, positions.new_full((1,), len(positions))]
    return torch.cat(borders) if len(starts) else None


def _positions(
    past: int, tokens: int, padding_BS: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """Each sequence counts its own tokens from 0."""
    if padding_BS is not None:
        return (padding_BS.long().cumsum(1) - 1).clamp(min=0)[:, past:]
    positions = torch.arange(past, past + tokens, device=device)
    if cu_seqlens is not None:
        positions = positions - torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff())
    return positions[None]
