"""A teacher's likeliest next tokens on disk: written once, read by students that run without the teacher.

A folder holds ``top_k.json`` and for every step ``step-00000012.safetensors`` with, for each micro-batch,
the tokens, their log probabilities, and a digest of the micro-batch that they belong to.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gearshift.files import atomic_file, read_json, write_json
from gearshift.train.documents import DataError
from gearshift.train.head_losses import FullTeacher, TopKTeacher, project
from gearshift.train.losses import chunks, upcast
from gearshift.train.packing import Batch
from gearshift.train.passes import TeacherPass

FORMAT = "gearshift-top-k-1"
DESCRIPTION = "top_k.json"


def step_file(folder: Path, step: int, rank: int = 0) -> Path:
    """The file of one step that one process writes."""
    return folder / f"step-{step:08d}-{rank:05d}.safetensors"


def write_description(folder: Path, top_k: int, steps: int) -> None:
    """Say that all steps are there."""
    write_json(folder / DESCRIPTION, {"format": FORMAT, "top_k": top_k, "steps": steps})


@torch.no_grad()
def likeliest(teacher: FullTeacher, top_k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The likeliest tokens of every place, (N, K) int32, and their log probabilities, float32."""
    tokens, values = [], []
    for rows in chunks(teacher.hidden_ND.shape[0], chunk):
        logits_CV = upcast(project(teacher.hidden_ND[rows], teacher.head_VD))
        best = torch.log_softmax(logits_CV, dim=-1).topk(top_k, dim=-1)
        tokens.append(best.indices.int())
        values.append(best.values.float())
    return torch.cat(tokens), torch.cat(values)


def write_step(path: Path, found: dict[int, tuple[Batch, Tensor, Tensor]]) -> None:
    """Write one step's likeliest tokens, by micro-batch."""
    tensors = {}
    for micro_batch, (batch, tokens_NK, values_NK) in found.items():
        tensors[f"{micro_batch}/tokens"] = tokens_NK.cpu()
        tensors[f"{micro_batch}/log_probabilities"] = values_NK.cpu()
        tensors[f"{micro_batch}/batch"] = _digest(batch)
    with atomic_file(path) as partial:
        save_file(tensors, partial)


class TopKReader:
    """Reads what a stage ``record`` wrote.

    Args:
        folder: where.

    Raises:
        DataError: the folder is missing or not complete.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / DESCRIPTION).is_file():
            raise DataError(
                f"{folder} holds no teacher_logits that are complete; write them with a stage 'record'"
            )
        described = read_json(folder / DESCRIPTION)
        if not isinstance(described, dict) or described.get("format") != FORMAT:
            raise DataError(f"{folder / DESCRIPTION} is of another format; expected {FORMAT!r}: record again")
        self.folder, self.steps = folder, described["steps"]
        self._read: tuple[int, dict[str, Tensor]] = (-1, {})

    def read(self, step: int, micro_batch: int, batch: Batch) -> TeacherPass:
        """The teacher of a micro-batch of a step, from 1, of the stage.

        Raises:
            DataError: it was not recorded, is damaged, or belongs to other tokens.
        """
        tensors = self._step(step)
        if not torch.equal(tensors.get(f"{micro_batch}/batch", torch.empty(0)), _digest(batch)):
            raise DataError(
                f"{self.folder} was recorded for other tokens than those of step {step}; expected the same "
                "data, seed, batch_size, micro_batches, sequence_length and packing in both stages, and both "
                "as the first stage of their run"
            )
        device = batch.input_ids.device
        tokens, values = (
            tensors[f"{micro_batch}/{key}"].to(device) for key in ("tokens", "log_probabilities")
        )
        return TeacherPass(TopKTeacher(tokens, values))

    def _step(self, step: int) -> dict[str, Tensor]:
        if self._read[0] != step:
            paths = sorted(self.folder.glob(step_file(self.folder, step).name.replace("00000.", "*.")))
            if not paths:
                raise DataError(
                    f"{self.folder} has no step {step}, only {self.steps}; record as many as are trained"
                )
            try:
                self._read = step, {k: v for path in paths for k, v in load_file(path).items()}
            except (OSError, SafetensorError) as error:
                raise DataError(f"{paths[0]} cannot be read ({error}); record again") from None
        return self._read[1]


def _digest(batch: Batch) -> Tensor:
    digest = hashlib.sha256(batch.input_ids.cpu().numpy().tobytes())
    digest.update(batch.counted.cpu().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
