"""What comes out of a calibration, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from gearshift.convert import convert_teacher
from gearshift.convert.source import ExportError
from gearshift.errors import CheckpointError, GearshiftError, OutputExistsError
from gearshift.inspect_directory import inspect_directory
from gearshift.placement import Placement, PlacementError
from gearshift.presets import Preset, write_presets
from gearshift.supernet import load_supernet, save_supernet
from gearshift.train.calibrate import CalibrationError, calibrate, run
from gearshift.train.data import DataError
from gearshift.train.device import DeviceError
from gearshift.train.tokens import TokenizerError
from tests.convert.teachers.test_qwen2 import MIXED
from tests.convert.tiny_teachers import SIZES, Variant, all_tensors, same_tensors, save_teacher
from tests.supernet.tools import only_holding
from tests.train.calibrate.tools import (
    RUN_SETTINGS,
    contents,
    go,
    relative_error,
    rows,
    tiny_settings,
)

LAYERS = range(3)
TRAINED = ("sliding_attention", "gated_delta_net", "kimi_delta_attention")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


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


# Refused.


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
    given = {"supernet": supernet_directory, "data": texts, "settings": RUN_SETTINGS} | changes
    with pytest.raises(error, match=told):
        calibrate(**given, out=tmp_path / "run", device="cpu", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("empty.txt", "", "empty.txt has 1 tokens; expected at least two sequences of 24"),
        ("empty.jsonl", "", "empty.jsonl holds no documents"),
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
    with pytest.raises(TokenizerError, match="made token 5000, but the model knows 257; copy the teacher's"):
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
