from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from gearshift.convert import convert_teacher
from gearshift.convert.source import ExportError
from gearshift.errors import CheckpointError, GearshiftError, OutputExistsError
from gearshift.files import read_json_lines
from gearshift.inspect_directory import inspect_directory
from gearshift.placement import Placement, PlacementError
from gearshift.presets import Preset, write_presets
from gearshift.supernet import load_supernet, save_supernet
from gearshift.train.calibrate import CalibrationError, CalibrationSettings, calibrate, fit, run
from gearshift.train.calibrate.directory import CalibrationDirectory
from gearshift.train.data import DataError
from gearshift.train.device import DeviceError
from tests.convert.teachers.test_qwen2 import MIXED
from tests.convert.tiny_teachers import SIZES, Variant, all_tensors, same_tensors, save_teacher
from tests.supernet.tools import only_holding
from tests.train.calibrate.tools import LENGTH, relative_error, tiny_settings

LAYERS = range(3)
TRAINED = ("sliding_attention", "gated_delta_net", "kimi_delta_attention")
SETTINGS = tiny_settings(tokens=30 * LENGTH, steps=5)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def go(
    supernet: Path, texts: Path, out: Path, settings: CalibrationSettings = SETTINGS, **options: Any
) -> Path:
    return calibrate(supernet, texts, out, settings, **{"device": "cpu", "progress": False} | options)


@pytest.fixture(scope="module")
def reference(supernet_directory: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted calibration of the tiny supernet. Read it, never write to it."""
    out = tmp_path_factory.mktemp("calibrated") / "run"
    assert go(supernet_directory, texts, out) == out / "supernet"
    return out


@pytest.fixture
def copied(supernet_directory: Path, tmp_path: Path) -> Path:
    """The tiny supernet, to be changed."""
    return shutil.copytree(supernet_directory, tmp_path / "copied")


def rows(out: Path) -> list[dict[str, Any]]:
    return read_json_lines(out / "calibration.jsonl")


def same_result(out: Path, reference: Path) -> bool:
    """Rows byte for byte, tensors bit for bit, and all other files."""
    names = [sorted(path.name for path in (root / "supernet").iterdir()) for root in (out, reference)]
    assert names[0] == names[1]
    others = [name for name in names[0] if not name.endswith(".safetensors")]
    return (
        (out / "calibration.jsonl").read_bytes() == (reference / "calibration.jsonl").read_bytes()
        and same_tensors(out / "supernet", reference / "supernet")
        and all(
            (out / "supernet" / n).read_bytes() == (reference / "supernet" / n).read_bytes() for n in others
        )
    )


# What comes out.


def test_only_trained_mixers_change(reference: Path, supernet_directory: Path):
    before, after = all_tensors(supernet_directory), all_tensors(reference / "supernet")
    assert before.keys() == after.keys()
    changed = set()
    for name, value in before.items():
        assert (value.dtype, value.shape) == (after[name].dtype, after[name].shape)
        if not torch.equal(value, after[name]):
            changed.add(".".join(name.split(".")[:5]))
    nearer = [row for row in rows(reference) if row["after"] < row["before"]]
    assert changed == {f"model.layers.{row['layer']}.mixers.{row['mixer']}" for row in nearer}
    assert {row["mixer"] for row in nearer} == set(TRAINED)


@torch.no_grad()
def test_full_attention_answers_with_the_same_bits(reference: Path, supernet_directory: Path):
    before, after = load_supernet(supernet_directory), load_supernet(reference / "supernet")
    tokens = torch.arange(2 * 60).view(2, 60)
    assert torch.equal(before(tokens, placement="fa*3").logits, after(tokens, placement="fa*3").logits)
    for placement in ("swa*3", "gdn*3", "kda*3"):
        given = (model(tokens, placement=placement).logits for model in (before, after))
        assert not torch.equal(*given)


@torch.no_grad()
def mixer_errors(supernet: Path, tokens: Tensor) -> dict[tuple[int, str], float]:
    """How far each mixer is from the attention of its layer, given what the teacher's layer is given."""
    model = load_supernet(supernet)
    errors: dict[tuple[int, str], float] = {}

    def compare(layer: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            hidden, _, context, _ = inputs
            for name in TRAINED:
                mixed = module.mixers[name](module.input_layernorm(hidden), context, None)
                errors[layer, name] = relative_error(mixed, output[1])

        return hook

    for layer, module in enumerate(model.model.layers):
        module.register_forward_hook(compare(layer))
    model(tokens, placement="fa*3")
    return errors


def test_mixers_are_nearer_to_the_teacher_on_text_they_never_saw(
    supernet_directory: Path, texts: Path, tmp_path: Path
):
    out = go(supernet_directory, texts, tmp_path / "run", tiny_settings(tokens=4800, steps=20))
    code = "def g99(x):\n    return x * 99 + 9801\n" * 2
    assert code[:30] not in texts.read_text()
    tokens = torch.tensor([run.load_tokenizer(supernet_directory)(code)["input_ids"][:60]])
    before, after = mixer_errors(supernet_directory, tokens), mixer_errors(out, tokens)
    for layer in LAYERS:
        for name in ("gated_delta_net", "kimi_delta_attention"):
            assert after[layer, name] < 0.6 * before[layer, name]
        # It starts with the teacher's weights, and this teacher's attention is flat: little is to be won.
        assert after[layer, "sliding_attention"] <= before[layer, "sliding_attention"]
    assert after[1, "sliding_attention"] < 0.9 * before[1, "sliding_attention"]


def test_rows_tell_of_every_layer_and_mixer(reference: Path):
    found = rows(reference)
    assert [(row["layer"], row["mixer"]) for row in found] == [(n, name) for n in LAYERS for name in TRAINED]
    for row in found:
        assert set(row) == {"layer", "mixer", "before", "after", "parts", "notes"}
        assert 0 < row["after"] <= row["before"]


def test_the_directory_holds_what_it_promises(reference: Path, supernet_directory: Path):
    assert {path.name for path in reference.iterdir()} == {"settings.json", "calibration.jsonl", "supernet"}
    record = json.loads((reference / "settings.json").read_text())
    assert record["settings"]["steps"] == 5
    assert record["provenance"]["torch"]
    assert inspect_directory(reference / "supernet").missing == []
    for name in ("teacher_config.json", *TOKENIZER):
        expected = (supernet_directory / name).read_bytes()
        assert (reference / "supernet" / name).read_bytes() == expected


def test_presets_go_and_the_teacher_s_extra_tensors_stay(copied: Path, texts: Path, tmp_path: Path):
    """Presets were measured of other weights."""
    from safetensors.torch import save_file

    write_presets(copied, [Preset("fast", Placement.parse("gdn*3"))])
    (copied / "teacher_extra").mkdir()
    save_file({"vision.weight": torch.arange(4.0)}, copied / "teacher_extra" / "model.safetensors")
    out = go(copied, texts, tmp_path / "run", tiny_settings(steps=1))
    assert (copied / "presets.json").exists()
    assert not (out / "presets.json").exists()
    assert same_tensors(out / "teacher_extra", copied / "teacher_extra")


def test_a_calibrated_supernet_can_be_calibrated(reference: Path, texts: Path, tmp_path: Path):
    again = go(reference / "supernet", texts, tmp_path / "run")
    assert [row["before"] for row in rows(tmp_path / "run")] == [row["after"] for row in rows(reference)]
    load_supernet(again)


def test_bfloat16_and_tied_heads_and_windows_of_the_teacher(
    teacher_directory: Path, texts: Path, tmp_path: Path
):
    config = Qwen2Config(**SIZES | MIXED | {"vocab_size": 257, "tie_word_embeddings": True})
    teacher = save_teacher(Qwen2ForCausalLM, config, Variant(dtype=torch.bfloat16), tmp_path / "teacher")
    for name in TOKENIZER:
        shutil.copyfile(teacher_directory / name, teacher / name)
    supernet = convert_teacher(teacher, tmp_path / "supernet", window=8)
    out = go(supernet, texts, tmp_path / "run")
    assert {value.dtype for value in all_tensors(out).values()} == {torch.bfloat16}
    before, after = load_supernet(supernet), load_supernet(out)
    tokens = torch.arange(60)[None]
    assert torch.equal(before(tokens, placement="fa*3").logits, after(tokens, placement="fa*3").logits)
    # The first and last layer have the window that sliding attention has: nothing is left to learn there.
    told = {(row["layer"], row["mixer"]): row["notes"] for row in rows(tmp_path / "run")}
    assert told[0, "sliding_attention"] == told[2, "sliding_attention"] == ["it was near enough"]
    assert told[1, "sliding_attention"] != ["it was near enough"]


def test_layers_may_hold_different_mixers(tiny_model, supernet_directory: Path, texts: Path, tmp_path: Path):
    held = [
        ("full_attention", "gated_delta_net"),
        ("full_attention",),
        ("sliding_attention", "full_attention"),
    ]
    thin = save_supernet(only_holding(tiny_model, held), tmp_path / "thin", source=supernet_directory)
    shown: list[list[str]] = []
    out = go(
        thin, texts, tmp_path / "run", layer_done=lambda rows: shown.append([row["mixer"] for row in rows])
    )
    assert shown == [["gated_delta_net"], [], ["sliding_attention"]]
    before, after = all_tensors(thin), all_tensors(out)
    moved = {name.split(".mixers.")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"model.layers.0", "model.layers.2"}


# Killed and resumed.


class Stopped(Exception):
    """Stands for a kill."""


def stop(*_: object, **__: object) -> None:
    raise Stopped


def stop_in_layer(layer: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but for the layer ``layer``, in which it raises."""

    def stopping(self: Any, number: int, *arguments: Any) -> Any:
        return stop() if number == layer else function(self, number, *arguments)

    return stopping


def resume(supernet: Path, texts: Path, out: Path) -> list[int]:
    """Returns the layers that were shown."""
    shown: list[int] = []

    def note(rows: Sequence[dict[str, Any]]) -> None:
        shown.append(rows[0]["layer"])

    go(supernet, texts, out, resume=True, layer_done=note)
    return shown


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    "where", ["before the teacher", "in the steps", "before its folder", "after its folder"]
)
def test_stopped_anywhere_in_a_layer_it_goes_on_to_the_same_bits(
    layer: int,
    where: str,
    supernet_directory: Path,
    texts: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    with monkeypatch.context() as patch:
        if where == "before the teacher":
            patch.setattr(run.TeacherWalk, "observe", stop_in_layer(layer, run.TeacherWalk.observe))
        elif where == "in the steps":
            patch.setattr(fit, "take_steps", _stop_in_second_mixer_of(layer))
        elif where == "before its folder":
            finish = CalibrationDirectory.finish_layer
            patch.setattr(CalibrationDirectory, "finish_layer", stop_in_layer(layer, finish))
        else:  # its folder is there, and so is still what only this layer needed
            hidden = f"hidden-{layer:05}.bin"
            patch.setattr(Path, "unlink", _stop_for(hidden, Path.unlink))
        with pytest.raises(Stopped):
            go(supernet_directory, texts, tmp_path / "run")
    assert not (tmp_path / "run" / "supernet").exists()
    assert resume(supernet_directory, texts, tmp_path / "run") == list(LAYERS)
    assert same_result(tmp_path / "run", reference)
    assert not (tmp_path / "run" / "work").exists()


def _stop_in_second_mixer_of(layer: int) -> Callable[..., Any]:
    taken, take_steps = [], fit.take_steps

    def stopping(*arguments: Any) -> Any:
        taken.append(1)
        return stop() if len(taken) == len(TRAINED) * layer + 2 else take_steps(*arguments)

    return stopping


def _stop_for(name: str, unlink: Callable[..., None]) -> Callable[..., None]:
    def stopping(self: Path, missing_ok: bool = False) -> None:
        return stop() if self.name == name else unlink(self, missing_ok=missing_ok)

    return stopping


@pytest.mark.parametrize("layer", LAYERS)
def test_stopped_between_layers_it_does_only_those_that_are_left(
    layer: int,
    supernet_directory: Path,
    texts: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def shown(rows: Sequence[dict[str, Any]]) -> None:
        if rows[0]["layer"] == layer:
            raise Stopped

    with pytest.raises(Stopped):
        go(supernet_directory, texts, tmp_path / "run", layer_done=shown)
    assert rows(tmp_path / "run") == rows(reference)[: len(TRAINED) * (layer + 1)]
    observed: list[int] = []
    observe = run.TeacherWalk.observe

    def note(self: Any, number: int, *arguments: Any) -> Any:
        observed.append(number)
        return observe(self, number, *arguments)

    monkeypatch.setattr(run.TeacherWalk, "observe", note)
    assert resume(supernet_directory, texts, tmp_path / "run") == list(LAYERS)
    assert observed == list(LAYERS)[layer + 1 :]
    assert same_result(tmp_path / "run", reference)


@pytest.mark.parametrize("what", ["gearshift.convert.plan.copy_companions", "clear"])
def test_stopped_at_the_very_end(
    what: str,
    supernet_directory: Path,
    texts: Path,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    with monkeypatch.context() as patch:
        if what == "clear":
            patch.setattr(CalibrationDirectory, "clear", stop)
        else:
            patch.setattr(what, stop)
        with pytest.raises(Stopped):
            go(supernet_directory, texts, tmp_path / "run")
    monkeypatch.setattr(run.TeacherWalk, "observe", lambda *_: pytest.fail("a layer was done again"))
    resume(supernet_directory, texts, tmp_path / "run")
    assert same_result(tmp_path / "run", reference)
    assert not (tmp_path / "run" / "work").exists()


RUN_SLOWLY = """
import sys, time
from gearshift.train.calibrate import CalibrationSettings, calibrate, fit
take_steps = fit.take_steps
def slowly(*arguments):
    time.sleep(0.2)
    return take_steps(*arguments)
fit.take_steps = slowly
settings = CalibrationSettings(**eval(sys.argv[4]))
calibrate(*sys.argv[1:4], settings, device="cpu", progress=False)
"""


def test_kill_and_resume_gives_the_same_bits(
    supernet_directory: Path, texts: Path, reference: Path, tmp_path: Path
):
    """A process is really killed, somewhere in its second or third layer."""
    torch.set_num_threads(1)
    out = tmp_path / "run"
    arguments = [str(supernet_directory), str(texts), str(out), repr(vars(SETTINGS))]
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_SLOWLY, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and not (out / "work" / "layer-00000").exists():
        assert time.monotonic() < deadline, "no layer was finished"
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "supernet").exists()
    assert resume(supernet_directory, texts, out) == list(LAYERS)
    assert same_result(out, reference)


def test_resuming_what_is_not_there_starts_it(
    supernet_directory: Path, texts: Path, reference: Path, tmp_path: Path
):
    assert resume(supernet_directory, texts, tmp_path / "run") == list(LAYERS)
    assert same_result(tmp_path / "run", reference)


def test_a_finished_calibration_is_left_alone(
    supernet_directory: Path, texts: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run, "_Run", lambda *_: pytest.fail("something was done again"))
    assert go(supernet_directory, texts, reference, resume=True) == reference / "supernet"
    with pytest.raises(OutputExistsError, match="go on with --resume, or give a new path"):
        go(supernet_directory, texts, reference)


# Refused.


@pytest.fixture
def interrupted(supernet_directory: Path, texts: Path, tmp_path: Path) -> Path:
    """A calibration of which two layers are finished."""

    def shown(rows: Sequence[dict[str, Any]]) -> None:
        if rows[0]["layer"] == 1:
            raise Stopped

    with pytest.raises(Stopped):
        go(supernet_directory, texts, tmp_path / "run", layer_done=shown)
    return tmp_path / "run"


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_other_settings_cannot_resume(supernet_directory: Path, texts: Path, interrupted: Path):
    before = contents(interrupted)
    for changes, told in (({"steps": 6}, "steps: was 5, now 6"), ({"seed": 9}, "seed: was 3, now 9")):
        settings = tiny_settings(**{"tokens": SETTINGS.tokens, "steps": 5} | changes)
        with pytest.raises(CalibrationError, match=f"was made otherwise .{told}"):
            go(supernet_directory, texts, interrupted, settings, resume=True)
    with pytest.raises(CalibrationError, match="tokens: was 720, now 480; data: was of digest"):
        go(supernet_directory, texts, interrupted, tiny_settings(tokens=480, steps=5), resume=True)
    assert contents(interrupted) == before


def test_another_supernet_cannot_resume(reference: Path, texts: Path, interrupted: Path):
    with pytest.raises(CalibrationError, match=r"otherwise \(supernet: was of digest [0-9a-f]{16}, now"):
        go(reference / "supernet", texts, interrupted, resume=True)


def test_other_data_cannot_resume(supernet_directory: Path, tmp_path: Path, interrupted: Path):
    (tmp_path / "other.txt").write_text("something else " * 300)
    with pytest.raises(CalibrationError, match=r"otherwise \(data: was of digest [0-9a-f]{12}, now"):
        go(supernet_directory, tmp_path / "other.txt", interrupted, resume=True)


def test_the_same_data_elsewhere_can(
    supernet_directory: Path, texts: Path, tmp_path: Path, interrupted: Path, reference: Path
):
    moved = shutil.copytree(supernet_directory, tmp_path / "moved")
    resume(moved, Path(shutil.copy(texts, tmp_path)), interrupted)
    assert same_result(interrupted, reference)


def test_truncated_hidden_states_are_named(supernet_directory: Path, texts: Path, interrupted: Path):
    path = interrupted / "work" / "hidden-00002.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CalibrationError, match=r"hidden-00002.bin has 92156 bytes; expected 92160 bytes"):
        go(supernet_directory, texts, interrupted, resume=True)
    path.unlink()
    with pytest.raises(CalibrationError, match=f"is missing.*: remove {interrupted} and start again"):
        go(supernet_directory, texts, interrupted, resume=True)


def test_a_damaged_layer_is_named_and_its_advice_helps(
    supernet_directory: Path, texts: Path, interrupted: Path, reference: Path
):
    path = interrupted / "work" / "layer-00001" / "mixers.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CalibrationError, match=f"remove {interrupted / 'work'} and go on with --resume"):
        go(supernet_directory, texts, interrupted, resume=True)
    assert not (interrupted / "supernet").exists()
    shutil.rmtree(interrupted / "work")
    assert resume(supernet_directory, texts, interrupted) == list(LAYERS)
    assert same_result(interrupted, reference)


@pytest.mark.parametrize("resumed", [False, True])
def test_something_else_is_not_touched(supernet_directory: Path, texts: Path, tmp_path: Path, resumed: bool):
    (tmp_path / "thesis.txt").write_text("do not lose me")
    with pytest.raises(CalibrationError if resumed else OutputExistsError):
        go(supernet_directory, texts, tmp_path, resume=resumed)
    assert contents(tmp_path) == {"thesis.txt": b"do not lose me"}


@pytest.mark.parametrize("resumed", [False, True])
def test_the_supernet_itself_is_no_place(copied: Path, texts: Path, resumed: bool):
    before = contents(copied)
    with pytest.raises(GearshiftError, match="give a new path"):
        go(copied, texts, copied, resume=resumed)
    assert contents(copied) == before


def test_a_result_cannot_take_the_place_of_what_it_is_made_from(reference: Path, texts: Path):
    with pytest.raises(ExportError, match="would replace the supernet"):
        go(reference / "supernet", texts, reference, resume=True)


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"supernet": "nowhere"}, CheckpointError, "no supernet at nowhere"),
        ({"data": "nowhere.txt"}, DataError, "nowhere.txt does not exist"),
        ({"settings": tiny_settings(tokens=30)}, CalibrationError, "tokens is 30; expected at least two"),
        (
            {"settings": tiny_settings(sequence_length=129)},
            CalibrationError,
            "sequence_length is 129; the teacher was made for 128 tokens at most",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    changes: dict[str, Any],
    error: type[GearshiftError],
    told: str,
    supernet_directory: Path,
    texts: Path,
    tmp_path: Path,
):
    given = {"supernet": supernet_directory, "data": texts, "settings": SETTINGS} | changes
    with pytest.raises(error, match=told):
        calibrate(**given, out=tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("empty.txt", "", "empty.txt has 1 tokens; expected at least two sequences of 24"),
        ("empty.jsonl", "", "empty.jsonl has 0 tokens"),
        ("short.txt", "x" * 46, "short.txt has 47 tokens"),
        ("table.csv", "a,b", "table.csv is of an unknown kind"),
    ],
)
def test_too_little_text_is_refused_before_anything_is_written(
    name: str, text: str, told: str, supernet_directory: Path, tmp_path: Path
):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=told):
        go(supernet_directory, tmp_path / name, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_supernet_with_nothing_to_train_is_refused(teacher_directory: Path, texts: Path, tmp_path: Path):
    supernet = convert_teacher(teacher_directory, tmp_path / "supernet", mixers=("fa",))
    with pytest.raises(
        CalibrationError, match="holds nothing but full attention; give a supernet with other"
    ):
        go(supernet, texts, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_supernet_without_its_teacher_is_refused(
    tiny_model, supernet_directory: Path, texts: Path, tmp_path: Path
):
    held = [("full_attention", "gated_delta_net"), ("gated_delta_net",), ("full_attention",)]
    thin = save_supernet(only_holding(tiny_model, held), tmp_path / "thin", source=supernet_directory)
    with pytest.raises(PlacementError, match="no full_attention in layers 1"):
        go(thin, texts, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_model_is_refused(copied: Path, texts: Path, tmp_path: Path):
    path = copied / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["x"] = 5000
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(
        CalibrationError, match="made token 5000, but the model knows 257; copy the teacher's"
    ):
        go(copied, texts, tmp_path / "run")
    for name in TOKENIZER:
        (copied / name).unlink()
    with pytest.raises(GearshiftError, match="holds no tokenizer"):
        go(copied, texts, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named(supernet_directory: Path, texts: Path, tmp_path: Path):
    with pytest.raises(DeviceError, match="torch finds no GPU"):
        go(supernet_directory, texts, tmp_path / "run", device="cuda")
    assert not (tmp_path / "run").exists()


def test_progress_names_layers_mixers_and_errors(
    supernet_directory: Path,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("gearshift.progress.SECONDS_BETWEEN_LINES", 0)
    go(supernet_directory, texts, tmp_path / "run", tiny_settings(steps=2), progress=True)
    shown = capsys.readouterr().err
    assert "calibrate 0/18  layer 0: the teacher" in shown
    assert "calibrate 8/18  layer 1, swa  error 0." in shown
    assert "calibrate 18/18  layer 2, kda  error " in shown
