"""The teacher's walk through its layers: hidden states come from one file and go to the next.

Shape letters: N windows, T tokens of a window, B windows of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from gearshift.placement import FULL_ATTENTION
from gearshift.supernet import SequenceContext, SupernetConfig
from gearshift.supernet.mixers.full_attention import FullAttention
from gearshift.supernet.modeling import SupernetLayer
from gearshift.supernet.tensor_files import TORCH_DTYPES, TensorFiles
from gearshift.train.calibrate.activations import map_activations, write_activations
from gearshift.train.calibrate.attention_statistics import AttentionDistances
from gearshift.train.calibrate.layers import embed, plain_context, read_teacher_layer
from gearshift.train.calibrate.steps import Batch
from gearshift.train.calibrate.windows import Windows
from gearshift.train.device import precision

# Tokens of a batch of the walk.
BATCH_TOKENS = 4096
# Batches whose attention is looked at for its distances.
STATISTICS_BATCHES = 4


@dataclass(frozen=True)
class Observed:
    """What full attention of one layer was given for every window, and what it made of it.

    Attributes:
        hidden_NTD: the layer's inputs, in a file.
        targets_NTD: the attention's outputs, in a file.
        norm: the norm before the mixers.
        context: positions.
        scales_H: see :meth:`AttentionDistances.time_scales`.
        device: where batches go.
    """

    hidden_NTD: Tensor
    targets_NTD: Tensor
    norm: nn.Module
    context: SequenceContext
    scales_H: Tensor
    device: torch.device

    def batch(self, windows: slice | Tensor) -> Batch:
        """Normed inputs, context and targets of some windows, on the device."""
        hidden, targets = (
            file_NTD[windows].to(self.device).float() for file_NTD in (self.hidden_NTD, self.targets_NTD)
        )
        return self.norm(hidden), self.context, targets

    def batches(self, first: int, end: int) -> Iterator[Batch]:
        """The windows from ``first`` to ``end``, several at a time."""
        size = max(1, BATCH_TOKENS // self.hidden_NTD.shape[1])
        for start in range(first, end, size):
            yield self.batch(slice(start, min(start + size, end)))


class TeacherWalk:
    """Runs the teacher one layer at a time over all windows.

    Args:
        config: of the supernet.
        files: its tensors.
        windows: the text.
        device: where to compute.
    """

    def __init__(
        self, config: SupernetConfig, files: TensorFiles, windows: Windows, device: torch.device
    ) -> None:
        assert config.hidden_size is not None
        self.config, self.files, self.windows, self.device = config, files, windows, device
        self.shape = (*windows.tokens_NT.shape, config.hidden_size)
        self.context = plain_context(config, windows.tokens_NT.shape[1], device)
        self._batch_size = max(1, BATCH_TOKENS // windows.tokens_NT.shape[1])

    def embed(self, out: Path) -> None:
        """Write the hidden states before the first layer."""
        tokens_NT = torch.from_numpy(self.windows.tokens_NT)
        batches = embed(self.files, tokens_NT.split(self._batch_size))
        write_activations(((batch,) for batch in batches), (out,))

    def open(self, path: Path, dtype: torch.dtype) -> Tensor:
        """A file that this walk wrote."""
        return map_activations(path, self.shape, dtype)

    @torch.no_grad()
    def observe(self, layer: int, given: Path, next_hidden: Path, targets: Path) -> Observed:
        """Run one layer: read its inputs, write its outputs and its attention's outputs."""
        dtype = self.hidden_dtype
        hidden_NTD = self.open(given, dtype)
        module = read_teacher_layer(self.config, self.files, layer, self.device)
        distances = AttentionDistances()
        with precision(self.device):
            self._look(module, hidden_NTD, distances)
            write_activations(self._outputs(module, hidden_NTD), (next_hidden, targets))
        return Observed(
            hidden_NTD,
            self.open(targets, dtype),
            module.input_layernorm,
            self.context,
            distances.time_scales(),
            self.device,
        )

    @property
    def hidden_dtype(self) -> torch.dtype:
        """The dtype of the embeddings, in which hidden states are kept, too."""
        return TORCH_DTYPES[self.files.infos["model.embed_tokens.weight"].dtype]

    def _look(self, module: SupernetLayer, hidden_NTD: Tensor, distances: AttentionDistances) -> None:
        attention = module.mixers[FULL_ATTENTION]
        assert isinstance(attention, FullAttention)
        learned_from = hidden_NTD[self.windows.judging :]
        for batch in learned_from.split(self._batch_size)[:STATISTICS_BATCHES]:
            distances.add(attention, module.input_layernorm(batch.to(self.device).float()), self.context)

    def _outputs(self, module: SupernetLayer, hidden_NTD: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in hidden_NTD.split(self._batch_size):
            hidden, mixed = module(batch.to(self.device).float(), FULL_ATTENTION, self.context, None)
            yield hidden.to(batch.dtype), mixed.to(batch.dtype)
