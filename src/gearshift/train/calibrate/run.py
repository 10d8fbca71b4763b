"""A calibration as a run: a directory that can be killed at any moment and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from gearshift.convert.plan import Plan, PlannedTensor, Step, run_plan, working_memory
from gearshift.convert.source import Source, open_source
from gearshift.placement import short_name
from gearshift.presets import PRESETS_FILE
from gearshift.progress import Report, show_progress
from gearshift.provenance import provenance
from gearshift.supernet import checkpoint_digest
from gearshift.supernet.checkpoint import expected_shapes
from gearshift.supernet.config import SupernetConfig
from gearshift.supernet.tensor_files import TORCH_DTYPES
from gearshift.train.calibrate.directory import CalibrationDirectory, Record, Row
from gearshift.train.calibrate.fit import Fitted, Material, fit_mixer
from gearshift.train.calibrate.layers import mixer_prefix, read_mixer, trained_mixers
from gearshift.train.calibrate.settings import CalibrationError, CalibrationSettings
from gearshift.train.calibrate.walk import TeacherWalk
from gearshift.train.calibrate.windows import Windows, read_windows
from gearshift.train.data import PackedTokens
from gearshift.train.device import choose_device
from gearshift.train.tokens import check_vocabulary, load_tokenizer, tokens_digest

CALIBRATED = "calibrated"


def calibrate(
    supernet: Path | str,
    data: Path | str,
    out: Path | str,
    settings: CalibrationSettings | None = None,
    *,
    device: str = "auto",
    resume: bool = False,
    progress: bool = True,
    layer_done: Callable[[Sequence[Row]], None] | None = None,
) -> Path:
    """Bring every mixer of every layer near to the full attention of its layer.

    The teacher walks through its layers one by one. What enters a layer lies in a file; of the weights, one
    layer's are in memory at a time, and of its mixers one. Kill it at any moment and call it again with
    ``resume``: it goes on with the first layer that was not finished, and on a CPU with the same number of
    threads the result is bit for bit that of an uninterrupted run.

    Args:
        supernet: the supernet directory to start from.
        data: documents, or a folder of Python files.
        out: the directory to make; the result is ``out / "supernet"``.
        settings: what to do; the defaults if None.
        device: ``auto``, ``cpu`` or ``cuda``.
        resume: go on with what is in ``out``, or start if there is nothing.
        progress: show a progress bar, or lines where stderr is no terminal.
        layer_done: called with the rows of each layer, those of earlier runs first.

    Returns:
        The calibrated supernet directory.

    Raises:
        CalibrationError: it cannot start, or cannot go on, with these settings, supernet or data.
        OutputExistsError: there is something at ``out``, and ``resume`` is false.
        PlacementError: a layer of the supernet holds no full attention.
        GearshiftError: the supernet, its tokenizer, the data or the device is missing or damaged.
    """
    settings = settings or CalibrationSettings()
    directory = CalibrationDirectory(Path(out))
    directory.refuse_existing(resume)
    source = open_source(supernet, directory.supernet, overwrite=True)
    _check_source(source, settings)
    windows = read_windows(Path(data), load_tokenizer(source.directory), settings)
    check_vocabulary(windows.tokens_NT, source.config.vocab_size, source.directory)
    walk = TeacherWalk(source.config, source.files, windows, choose_device(device))
    directory.start(_record(source, windows, settings))
    if not directory.supernet.exists():
        _Run(directory, walk, settings, layer_done or (lambda rows: None)).finish(progress)
        run_plan(_plan(source, directory), source.files, directory.supernet, progress=progress)
    directory.clear()
    return directory.supernet


def _check_source(source: Source, settings: CalibrationSettings) -> None:
    source.space.teacher()
    if not any(_trained_by_layer(source.config)):
        raise CalibrationError(
            f"{source.directory} holds nothing but full attention; give a supernet with other mixers, too"
        )
    longest = source.config.max_position_embeddings
    if settings.sequence_length > longest:
        raise CalibrationError(
            f"sequence_length is {settings.sequence_length}; the teacher was made for {longest} tokens "
            "at most"
        )


def _record(source: Source, windows: Windows, settings: CalibrationSettings) -> Record:
    tokens = PackedTokens(windows.tokens_NT.flatten())
    return Record(settings, checkpoint_digest(source.directory), tokens_digest(tokens), provenance())


def _trained_by_layer(config: SupernetConfig) -> list[tuple[str, ...]]:
    return [trained_mixers(config, layer) for layer in range(config.placement_space.num_layers)]


class _Run:
    """The layers that are left, one after another."""

    def __init__(
        self,
        directory: CalibrationDirectory,
        walk: TeacherWalk,
        settings: CalibrationSettings,
        layer_done: Callable[[Sequence[Row]], None],
    ) -> None:
        self.directory, self.walk, self.settings = directory, walk, settings
        self.layer_done = layer_done
        self.trained = _trained_by_layer(walk.config)
        self.rows: list[Row] = []

    def finish(self, progress: bool) -> None:
        """Do every layer that is not finished."""
        first = self.directory.finished_layers()
        for layer in range(first):
            self._show(self.directory.read_rows(layer))
        items = [len(mixers) * self.settings.steps for mixers in self.trained]
        with show_progress("calibrate", sum(items), sum(items[:first]), progress) as report:
            if first == 0:
                self.walk.embed(self.directory.hidden(0))
            for layer in range(first, len(self.trained)):
                self._calibrate_layer(layer, sum(items[:layer]), report)

    def _calibrate_layer(self, layer: int, done: int, report: Report) -> None:
        directory = self.directory
        report(done, f"layer {layer}: the teacher")
        observed = self.walk.observe(
            layer, directory.hidden(layer), directory.hidden(layer + 1), directory.targets
        )
        material = Material(layer, observed, self.walk.windows, self.settings)
        tensors, rows = {}, []
        for index, name in enumerate(self.trained[layer]):
            what = f"layer {layer}, {short_name(name)}"
            start = done + index * self.settings.steps
            fitted = self._fit(material, name, partial(_report_step, report, start, what))
            tensors |= {mixer_prefix(layer, name) + key: value for key, value in fitted.weights.items()}
            rows.append(fitted.row(layer, name))
        directory.finish_layer(layer, tensors, rows)
        self._show(rows)

    def _fit(self, material: Material, name: str, report: Callable[[int, float], None]) -> Fitted:
        files, layer = self.walk.files, material.layer
        mixer = read_mixer(self.walk.config, files, layer, name, self.walk.device)
        dtypes = {
            key: TORCH_DTYPES[files.infos[mixer_prefix(layer, name) + key].dtype]
            for key, _ in mixer.named_parameters()
        }
        return fit_mixer(mixer, material, dtypes, report)

    def _show(self, rows: Sequence[Row]) -> None:
        self.rows += rows
        self.directory.write_rows([json.dumps(row, allow_nan=False) for row in self.rows])
        self.layer_done(rows)


def _report_step(report: Report, start: int, what: str, step: int, error: float) -> None:
    report(start + step, f"{what}  error {error:.3f}")


def _plan(source: Source, directory: CalibrationDirectory) -> Plan:
    """The supernet as it was, but for its calibrated mixers and for presets measured of other weights."""
    infos, layers = source.files.infos, range(source.space.num_layers)
    trained = tuple(
        mixer_prefix(layer, name) for layer in layers for name in trained_mixers(source.config, layer)
    )
    stored = [name for name in expected_shapes(source.config) if name in infos]
    steps = [source.copies({name: name for name in stored if not name.startswith(trained)})]
    for layer in layers:
        own = tuple(mixer_prefix(layer, name) for name in trained_mixers(source.config, layer))
        names = [name for name in stored if own and name.startswith(own)]
        planned = tuple(PlannedTensor(name, infos[name], (name,), CALIBRATED) for name in names)
        memory = working_memory((), (infos[name] for name in names))
        steps.append(Step(planned, partial(_calibrated, directory, layer), memory))
    companions = source.companions_without({PRESETS_FILE})
    return Plan(source.config, tuple(steps), source.directory, companions)


def _calibrated(
    directory: CalibrationDirectory, layer: int, read: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    return directory.read_tensors(layer)
