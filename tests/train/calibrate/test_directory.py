from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given

from gearshift.errors import FileFormatError, GearshiftError, OutputExistsError
from gearshift.train.calibrate.directory import CalibrationDirectory, Record, read_record
from gearshift.train.calibrate.settings import CalibrationError, CalibrationSettings
from tests.train.calibrate.test_settings import some_settings
from tests.train.calibrate.tools import tiny_settings

RECORD = Record(tiny_settings(), "0123456789abcdef", "0123456789ab", {"commit": "unknown"})


@pytest.fixture
def directory(tmp_path: Path) -> CalibrationDirectory:
    return CalibrationDirectory(tmp_path / "run")


def finish(directory: CalibrationDirectory, layer: int) -> dict[str, torch.Tensor]:
    tensors = {"a.weight": torch.full((2, 3), float(layer)), "b": torch.ones(4, dtype=torch.bfloat16)}
    directory.finish_layer(layer, tensors, [{"layer": layer, "before": None}])
    return tensors


@given(some_settings)
def test_a_record_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, settings: CalibrationSettings
):
    directory = CalibrationDirectory(tmp_path_factory.mktemp("record") / "run")
    record = replace(RECORD, settings=settings)
    directory.start(record)
    assert read_record(directory.record) == record
    directory.start(record)


def test_where_and_when_it_was_started_may_differ(directory: CalibrationDirectory):
    directory.start(RECORD)
    before = directory.record.read_bytes()
    directory.start(replace(RECORD, provenance={"commit": "another"}))
    assert directory.record.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"settings": tiny_settings(steps=9)}, ["steps: was 8, now 9"]),
        (
            {"settings": tiny_settings(parts=("ridge",))},
            ["parts: was ('decay', 'steps', 'ridge'), now ('ridge',)"],
        ),
        ({"supernet": "f" * 16}, ["supernet: was of digest 0123456789abcdef, now ffffffffffffffff"]),
        ({"data": "f" * 12}, ["data: was of digest 0123456789ab, now ffffffffffff"]),
        (
            {"settings": tiny_settings(seed=4, ridge=0.5), "data": "f" * 12},
            ["ridge: was 0.001, now 0.5", "seed: was 3, now 4", "data: was of digest"],
        ),
    ],
)
def test_what_it_is_made_from_may_not_differ(
    directory: CalibrationDirectory, changes: dict[str, Any], told: list[str]
):
    directory.start(RECORD)
    before = directory.record.read_bytes()
    with pytest.raises(CalibrationError, match="run was made otherwise") as caught:
        directory.start(replace(RECORD, **changes))
    assert all(part in str(caught.value) for part in told)
    assert str(caught.value).count(": was ") == len(told)
    assert "resume with what it was started with, or give a new path" in str(caught.value)
    assert directory.record.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": "gearshift-calibration-9"}, "the format is 'gearshift-calibration-9'; expected"),
        ({"format": None}, "the format is None; expected 'gearshift-calibration-1'"),
        ({"data": None}, "has no key 'data'"),
        ({"more": 1}, "has an unknown key 'more'"),
        ({"settings": {}}, "settings: parts is None; expected a list"),
        ({"settings": {"parts": "steps"}}, "settings: parts is 'steps'; expected a list"),
        ({"settings": {"parts": [1]}}, "parts are 1; expected some of"),
        ({"settings": {"parts": ["steps"], "steps": 0}}, "steps is 0; expected a whole number"),
        ({"settings": {"stepps": 1}}, "settings has an unknown key 'stepps'"),
        ({"settings": []}, r"settings is \[\]; expected a JSON object"),
    ],
)
def test_a_damaged_record_is_refused(directory: CalibrationDirectory, change: dict[str, Any], told: str):
    directory.start(RECORD)
    fields = json.loads(directory.record.read_text()) | change
    fields = {key: value for key, value in fields.items() if value is not None}
    directory.record.write_text(json.dumps(fields))
    with pytest.raises(CalibrationError, match=told):
        directory.start(RECORD)


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "\xff"])
def test_a_record_that_is_no_json_is_refused(directory: CalibrationDirectory, text: str):
    directory.start(RECORD)
    directory.record.write_bytes(text.encode("latin-1"))
    with pytest.raises(FileFormatError, match="settings.json is not valid JSON"):
        directory.start(RECORD)


def test_nothing_is_refused_where_nothing_is(directory: CalibrationDirectory):
    for resume in (False, True):
        directory.refuse_existing(resume)
    directory.root.mkdir()
    for resume in (False, True):
        directory.refuse_existing(resume)


def test_a_run_killed_while_it_wrote_its_record_may_start_again(
    directory: CalibrationDirectory, monkeypatch: pytest.MonkeyPatch
):
    """The temporary name is taken from the writer itself, so that both stay together."""
    with monkeypatch.context() as patch:
        patch.setattr("gearshift.files.os.replace", _stop)
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with pytest.raises(KeyboardInterrupt):
            directory.start(RECORD)
    assert [path.name.startswith(".settings.json.") for path in directory.root.iterdir()] == [True]
    for resume in (False, True):
        directory.refuse_existing(resume)
    (directory.root / "thesis.txt").touch()
    with pytest.raises(OutputExistsError):
        directory.refuse_existing(resume=False)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_calibration_is_gone_on_with_only_when_asked(directory: CalibrationDirectory):
    directory.start(RECORD)
    with pytest.raises(OutputExistsError, match="run already exists; go on with --resume, or give a new"):
        directory.refuse_existing(resume=False)
    directory.refuse_existing(resume=True)


@pytest.mark.parametrize("kind", ["folder", "file", "link to nothing"])
def test_something_else_is_refused(directory: CalibrationDirectory, kind: str):
    if kind == "folder":
        directory.root.mkdir()
        (directory.root / "thesis.txt").write_text("do not lose me")
    elif kind == "file":
        directory.root.write_text("do not lose me")
    else:
        directory.root.symlink_to("nowhere")
    with pytest.raises(OutputExistsError, match="already exists"):
        directory.refuse_existing(resume=False)
    with pytest.raises(CalibrationError, match="holds no settings.json, so it is no calibration"):
        directory.refuse_existing(resume=True)


def test_a_finished_layer_is_kept_and_what_only_it_needed_goes(directory: CalibrationDirectory):
    directory.work.mkdir(parents=True)
    for path in (directory.hidden(0), directory.hidden(1), directory.targets):
        path.write_bytes(b"states")
    tensors = finish(directory, 0)
    assert {path.name for path in directory.work.iterdir()} == {"hidden-00001.bin", "layer-00000"}
    found = directory.read_tensors(0)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert directory.read_rows(0) == [{"layer": 0, "before": None}]


def test_a_layer_without_tensors_is_finished_too(directory: CalibrationDirectory):
    directory.finish_layer(0, {}, [])
    assert (directory.finished_layers(), directory.read_tensors(0), directory.read_rows(0)) == (1, {}, [])


def test_a_layer_that_is_done_again_replaces_the_old_one(directory: CalibrationDirectory):
    finish(directory, 0)
    directory.finish_layer(0, {"c": torch.zeros(1)}, [])
    assert set(directory.read_tensors(0)) == {"c"}
    assert directory.finished_layers() == 1


def test_layers_count_from_the_first(directory: CalibrationDirectory):
    assert directory.finished_layers() == 0
    for layer in (0, 1, 3):
        finish(directory, layer)
    assert directory.finished_layers() == 2
    (directory.work / ".layer-00002.01234567.partial").mkdir()
    assert directory.finished_layers() == 2
    finish(directory, 2)
    assert directory.finished_layers() == 4


def test_a_layer_whose_writing_failed_is_not_finished(
    directory: CalibrationDirectory, monkeypatch: pytest.MonkeyPatch
):
    directory.work.mkdir(parents=True)
    directory.hidden(0).write_bytes(b"states")
    monkeypatch.setattr("gearshift.train.calibrate.directory.write_json", _stop)
    with pytest.raises(KeyboardInterrupt):
        finish(directory, 0)
    assert {path.name for path in directory.work.iterdir()} == {"hidden-00000.bin"}


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "noise"])
def test_a_damaged_layer_is_named(directory: CalibrationDirectory, damage: str):
    finish(directory, 0)
    finish(directory, 1)
    path = directory.layer(1) / "mixers.safetensors"
    content = {"cut": path.read_bytes()[:-3], "empty": b"", "noise": b"\xff" * 100}
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[damage])
    with pytest.raises(CalibrationError) as caught:
        directory.read_tensors(1)
    assert f"{path} cannot be read" in str(caught.value)
    assert f"remove {directory.work} and go on with --resume" in str(caught.value)
    directory.read_tensors(0)


def test_damaged_rows_are_named(directory: CalibrationDirectory):
    finish(directory, 0)
    (directory.layer(0) / "rows.json").write_text("[{")
    with pytest.raises(GearshiftError, match="rows.json is not valid JSON"):
        directory.read_rows(0)


def test_rows_are_lines(directory: CalibrationDirectory):
    directory.write_rows(['{"layer": 0}', '{"layer": 1}'])
    assert directory.rows.read_text() == '{"layer": 0}\n{"layer": 1}\n'
    directory.write_rows([])
    assert directory.rows.read_text() == ""


def test_clearing_removes_the_work_and_nothing_else(directory: CalibrationDirectory):
    directory.start(RECORD)
    finish(directory, 0)
    directory.clear()
    directory.clear()
    assert [path.name for path in directory.root.iterdir()] == ["settings.json"]
