"""A trained supernet as a directory: the one it started from, but for the mixers that were trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gearshift.convert.plan import Plan, PlannedTensor, Step, run_plan, working_memory
from gearshift.convert.source import Source, open_source
from gearshift.presets import PRESETS_FILE
from gearshift.supernet.checkpoint import expected_shapes
from gearshift.tensor_headers import TensorInfo
from gearshift.train.distributed import Group, whole
from gearshift.train.trainer import layer_of

TRAINED = "trained"


def export_supernet(trained: Mapping[str, Tensor], supernet: Path, out: Path, group: Group) -> None:
    """Write a supernet directory; it appears whole or not at all.

    What was not trained leaves as it came, bit for bit; what was trained is stored in float32. Presets are
    left behind: they were measured with other weights.

    Args:
        trained: the trained parameters by name, whole or split over the processes.
        supernet: the directory that the run started from.
        out: where.
        group: the processes; the first one writes.

    Raises:
        CheckpointError: it could not be written, or a weight is not finite.
    """
    by_layer: dict[int, list[str]] = {}
    for name in trained:
        by_layer.setdefault(layer_of(name), []).append(name)
    if group.first:
        source = open_source(supernet, out, overwrite=True)
        run_plan(_plan(source, trained, by_layer), source.files, out)
    else:
        for names in by_layer.values():
            _whole(trained, names, lambda name: torch.empty(0))
    group.wait()


def _plan(source: Source, trained: Mapping[str, Tensor], by_layer: Mapping[int, list[str]]) -> Plan:
    stored = [name for name in expected_shapes(source.config) if name in source.files.infos]
    steps = [source.copies({name: name for name in stored if name not in trained})]
    for names in by_layer.values():
        infos = [TensorInfo(tuple(trained[name].shape), "F32") for name in names]
        planned = tuple(
            PlannedTensor(name, info, (name,), TRAINED) for name, info in zip(names, infos, strict=True)
        )
        steps.append(Step(planned, partial(_whole, trained, names), working_memory((), infos)))
    companions = source.companions_without({PRESETS_FILE})
    return Plan(source.config, tuple(steps), source.directory, companions)


def _whole(
    trained: Mapping[str, Tensor], names: Iterable[str], read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """The trained tensors put together; every process has to take part."""
    return {name: whole(trained[name]) for name in names}
