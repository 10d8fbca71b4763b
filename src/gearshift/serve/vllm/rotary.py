"""Rotary embeddings: vLLM's kernel with exactly the angles that the supernet has in Transformers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from gearshift.serve.vllm.guards import expect_attributes
from gearshift.supernet.config import SupernetConfig
from gearshift.supernet.mixer_configs import AttentionConfig
from gearshift.supernet.rotary import own_rotary_embedding

expect_attributes(RotaryEmbedding, "_compute_cos_sin_cache")


class TableRotaryEmbedding(RotaryEmbedding):
    """Whatever kind it is, as long as a position's angles do not depend on the length of the text."""

    def __init__(
        self, config: SupernetConfig, mixer: AttentionConfig, positions: int, dtype: torch.dtype
    ) -> None:
        own = own_rotary_embedding(config, mixer)
        # A copy: Transformers completes the parameters of the config that it is given.
        shared = LlamaRotaryEmbedding(copy.deepcopy(config))  # pyright: ignore[reportArgumentType]
        self._source = [own or shared]
        rotary_dim = 2 * len(self._source[0].inv_freq)
        super().__init__(mixer.head_dim, rotary_dim, positions, 1.0, True, dtype)

    def _compute_cos_sin_cache(self) -> Tensor:
        """Cosines, then sines, (positions, channels); in float32, as Transformers computes them."""
        source = self._source[0]
        positions = torch.arange(self.max_position_embeddings, dtype=torch.float32)
        angles = torch.outer(positions, source.inv_freq.float().to(positions.device))
        return torch.cat((angles.cos(), angles.sin()), dim=-1) * source.attention_scaling
