"""Every layer's inputs and attention outputs against those of the teacher's own class in Transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gearshift.supernet import load_supernet
from gearshift.train.calibrate import walk as walk_module
from gearshift.train.calibrate.settings import CalibrationError
from gearshift.train.calibrate.walk import Observed
from gearshift.train.calibrate.windows import Windows
from tests.train.calibrate.tools import (
    LAYERS,
    LENGTH,
    lively_supernet,
    observe_all,
    random_windows,
    relative_error,
    walk_of,
)


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lively_supernet(tmp_path_factory.mktemp("lively"))


@torch.no_grad()
def of_transformers(teacher: Path, windows: Windows) -> list[tuple[Tensor, Tensor]]:
    """Inputs and attention outputs of every layer, and the last layer's outputs without a partner."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    hidden: list[Tensor] = []
    mixed: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
        layer.self_attn.register_forward_hook(lambda module, inputs, output: mixed.append(output[0]))
    model.model.norm.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
    model(torch.from_numpy(windows.tokens_NT))
    return list(zip(hidden, [*mixed, torch.empty(0)], strict=True))


@pytest.mark.parametrize("batch_tokens", [4096, 5 * LENGTH, 1])
def test_every_layer_sees_what_the_teacher_s_layer_sees(
    lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
):
    """The first and last layer have a window of 8, far below the length."""
    monkeypatch.setattr(walk_module, "BATCH_TOKENS", batch_tokens)
    windows = random_windows(count=13)
    walk = walk_of(lively, windows)
    expected = of_transformers(lively.with_name("teacher"), windows)
    for layer, observed in enumerate(observe_all(walk, tmp_path)):
        hidden, mixed = expected[layer]
        torch.testing.assert_close(observed.hidden_NTD, hidden, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(observed.targets_NTD, mixed, rtol=1e-4, atol=1e-5)
    last = walk.open(tmp_path / f"hidden-{LAYERS}", torch.float32)
    torch.testing.assert_close(last, expected[LAYERS][0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_batches_hold_normed_inputs_positions_and_targets(lively: Path, tmp_path: Path):
    windows, model = random_windows(), load_supernet(lively)
    for layer, observed in enumerate(observe_all(walk_of(lively, windows), tmp_path)):
        module = model.model.layers[layer]
        for name, mixer in module.mixers.items():  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
            x, context, targets = observed.batch(torch.tensor([5, 1, 5]))
            assert torch.equal(x, module.input_layernorm(observed.hidden_NTD[[5, 1, 5]]))  # pyright: ignore[reportCallIssue]
            assert torch.equal(targets, observed.targets_NTD[[5, 1, 5]])
            if name == "full_attention":
                torch.testing.assert_close(mixer(x, context, None), targets, rtol=1e-4, atol=1e-5)


def test_all_windows_of_a_range_come_once_and_in_order(
    lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(walk_module, "BATCH_TOKENS", 4 * LENGTH + 1)
    observed = next(observe_all(walk_of(lively, random_windows()), tmp_path))
    batches = list(observed.batches(3, 17))
    assert [len(targets) for *_, targets in batches] == [4, 4, 4, 2]
    assert torch.equal(torch.cat([targets for *_, targets in batches]), observed.targets_NTD[3:17])
    assert list(observed.batches(5, 5)) == []


def test_windows_that_judge_say_nothing_of_distances(
    lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(walk_module.AttentionDistances, "time_scales", lambda self: self.mass_HT)
    windows = random_windows(judging=4)
    others = random_windows(judging=4, seed=1)
    tokens = windows.tokens_NT.copy()
    tokens[:4] = others.tokens_NT[:4]
    first, second, third = (
        [observed.scales_H for observed in observe_all(walk_of(lively, given), tmp_path / str(n))]
        for n, given in enumerate((windows, replace(windows, tokens_NT=tokens), others))
    )
    assert all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, third))


def test_heads_of_a_windowed_layer_look_less_far(lively: Path, tmp_path: Path):
    first, middle, last = (seen.scales_H for seen in observe_all(walk_of(lively, random_windows()), tmp_path))
    assert max(first.max(), last.max()) <= 8 / 0.693
    assert middle.max() > first.max()


def test_only_some_batches_are_looked_at(lively: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    looked: list[int] = []
    add = walk_module.AttentionDistances.add

    def counting(self, attention, x_BTD, context) -> None:
        looked.append(len(x_BTD))
        add(self, attention, x_BTD, context)

    monkeypatch.setattr(walk_module, "BATCH_TOKENS", 2 * LENGTH)
    monkeypatch.setattr(walk_module.AttentionDistances, "add", counting)
    next(observe_all(walk_of(lively, random_windows()), tmp_path))
    assert looked == [2] * walk_module.STATISTICS_BATCHES


def test_bfloat16_supernets_keep_hidden_states_in_bfloat16(tmp_path: Path):
    supernet, windows = lively_supernet(tmp_path, torch.bfloat16), random_windows()
    walk = walk_of(supernet, windows)
    expected = of_transformers(tmp_path / "teacher", windows)
    seen: list[Observed] = list(observe_all(walk, tmp_path / "work"))
    for observed, (hidden, mixed) in zip(seen, expected[:LAYERS], strict=True):
        assert (observed.hidden_NTD.dtype, observed.targets_NTD.dtype) == (torch.bfloat16, torch.bfloat16)
        assert relative_error(observed.hidden_NTD, hidden) < 0.02
        assert relative_error(observed.targets_NTD, mixed) < 0.05
        x, _, targets = observed.batch(slice(0, 2))
        assert (x.dtype, targets.dtype) == (torch.float32, torch.float32)
    assert (tmp_path / "work" / "hidden-0").stat().st_size == 2 * windows.tokens_NT.size * 32


def test_another_run_s_files_are_refused(lively: Path, tmp_path: Path):
    walk = walk_of(lively, random_windows(count=9))
    next(observe_all(walk_of(lively, random_windows(count=10)), tmp_path / "run" / "work"))
    with pytest.raises(CalibrationError, match="hidden-1 has 30720 bytes; expected 27648 bytes"):
        walk.open(tmp_path / "run" / "work" / "hidden-1", torch.float32)
