"""One layer's parts, read from a supernet directory by name; nothing of another layer is read.

Shape letters: B batch, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gearshift.placement import FULL_ATTENTION
from gearshift.supernet import SequenceContext, SupernetConfig
from gearshift.supernet.mixers import MIXER_CLASSES, Mixer
from gearshift.supernet.modeling import SupernetLayer
from gearshift.supernet.tensor_files import TensorFiles


def read_teacher_layer(
    config: SupernetConfig, files: TensorFiles, layer: int, device: torch.device
) -> SupernetLayer:
    """A layer with full attention as its only mixer, in float32."""
    with no_init_weights():
        module = SupernetLayer(config, layer)
    module.mixers = nn.ModuleDict({FULL_ATTENTION: module.mixers[FULL_ATTENTION]})
    _read_weights(module, files, layer_prefix(layer))
    return module.to(device).requires_grad_(False)


def read_mixer(
    config: SupernetConfig, files: TensorFiles, layer: int, name: str, device: torch.device
) -> Mixer:
    """One mixer of a layer, in float32."""
    with no_init_weights():
        mixer = MIXER_CLASSES[name](config, config.mixer_config(name, layer))
    _read_weights(mixer, files, mixer_prefix(layer, name))
    return mixer.to(device)


def layer_prefix(layer: int) -> str:
    """How the names of a layer's tensors begin."""
    return f"model.layers.{layer}."


def mixer_prefix(layer: int, name: str) -> str:
    """How the names of a mixer's tensors begin."""
    return f"{layer_prefix(layer)}mixers.{name}."


def trained_mixers(config: SupernetConfig, layer: int) -> tuple[str, ...]:
    """The mixers of a layer that are not the teacher's own."""
    return tuple(name for name in config.layer_mixer_names(layer) if name != FULL_ATTENTION)


@torch.no_grad()
def _read_weights(module: nn.Module, files: TensorFiles, prefix: str) -> None:
    for name, parameter in module.named_parameters():
        parameter.data = files.read(prefix + name).float()


def plain_context(config: SupernetConfig, tokens: int, device: torch.device) -> SequenceContext:
    """What layers need to know of a batch of whole sequences: their positions. It serves any batch size."""
    positions_BT = torch.arange(tokens, device=device)[None]
    rotary = LlamaRotaryEmbedding(config).to(device)  # pyright: ignore[reportArgumentType] - reads shared names
    cos_sin = rotary(torch.zeros(1, device=device), positions_BT)
    return SequenceContext(cos_sin, past=0, positions_BT=positions_BT)


def embed(files: TensorFiles, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """For each batch of tokens (B, T) the hidden states before the first layer, (B, T, D), as stored."""
    table_VD = files.read("model.embed_tokens.weight")
    for tokens_BT in batches:
        yield table_VD[tokens_BT]
