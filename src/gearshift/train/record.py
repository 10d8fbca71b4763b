"""The stage ``record``: the teacher's likeliest next tokens, written down step by step."""

from __future__ import annotations

from collections.abc import Sequence

from gearshift.train.distributed import Group
from gearshift.train.head_losses import FullTeacher
from gearshift.train.packing import Batch
from gearshift.train.passes import Passes
from gearshift.train.recipe import LossWeights, RecordStage
from gearshift.train.top_k import likeliest, step_file, write_description, write_step

DIVERGENCE = LossWeights(forward_kl=1.0, activation=0.0)


def record_step(
    passes: Passes, stage: RecordStage, number: int, batches: Sequence[Batch], group: Group
) -> None:
    """Write one step; after the last one, say that the folder is complete.

    Args:
        passes: run the teacher.
        stage: what to write, and where.
        number: of the step within the stage, from 1.
        batches: the micro-batches of this process.
        group: the processes.
    """
    found = {}
    own = range(group.rank, stage.micro_batches, group.ranks)
    for micro_batch, batch in zip(own, batches, strict=True):
        moved = batch.to(group.device)
        teacher = passes.run_teacher(moved, DIVERGENCE, ())
        assert isinstance(teacher.head, FullTeacher)
        top_k = min(stage.top_k, teacher.head.head_VD.shape[0] - 1)
        found[micro_batch] = (batch, *likeliest(teacher.head, top_k, passes.head_chunk))
    write_step(step_file(stage.write, number, group.rank), found)
    if number == stage.steps:
        group.wait()
        if group.first:
            write_description(stage.write, stage.top_k, stage.steps)
