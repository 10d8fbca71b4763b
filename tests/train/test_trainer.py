from __future__ import annotations

import numpy as np
import pytest
import torch

from gearshift.placement import FULL_ATTENTION, Placement
from gearshift.train import trainer as trainer_module
from gearshift.train.data import PackedTokens
from gearshift.train.losses import activation_matching, forward_kl
from gearshift.train.trainer import DivergedError, Trainer, takes_weight_decay

TOKENS = PackedTokens(np.random.default_rng(0).integers(0, 257, 2000, dtype=np.int32))


@pytest.fixture
def make_trainer(tiny_model, make_recipe):
    return lambda **changes: Trainer(tiny_model, TOKENS, make_recipe(**changes))


@pytest.fixture
def placed(monkeypatch):
    """Let a test choose the placement of every student pass."""

    def choose(text: str) -> None:
        monkeypatch.setattr(trainer_module, "sample_placement", lambda *args: Placement.parse(text))

    return choose


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def changed(trainer: Trainer, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}


def test_only_the_placement_s_mixers_move(make_trainer, placed):
    placed("swa fa gdn")
    trainer = make_trainer(weight_decay=0.1)
    before = weights(trainer)
    for step in (1, 2):
        trainer.train_step(step)
    moved = {name.split(".weight")[0] for name in changed(trainer, before)}
    assert moved
    allowed = ("model.layers.0.mixers.sliding_attention.", "model.layers.2.mixers.gated_delta_net.")
    assert all(name.startswith(allowed) for name in moved)


def test_a_mixer_that_was_once_used_then_rests(make_trainer, placed):
    """AdamW's momentum and decay must not move a mixer in steps that do not use it."""
    trainer = make_trainer(weight_decay=0.1)
    placed("kda kda kda")
    trainer.train_step(1)
    placed("swa swa swa")
    before = weights(trainer)
    trainer.train_step(2)
    assert all("sliding_attention" in name for name in changed(trainer, before))


def test_full_attention_and_shared_weights_are_frozen(make_trainer):
    trainer = make_trainer()
    names = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
    assert set(trainer.trained).isdisjoint(names)
    assert all(f".mixers.{FULL_ATTENTION}." in name or ".mixers." not in name for name in names)
    assert all(".mixers." in name and FULL_ATTENTION not in name for name in trainer.trained)


def test_reported_losses_are_those_of_the_formulas(make_trainer, placed, tiny_model):
    placed("fa gdn swa")
    trainer = make_trainer(weights={"forward_kl": 0.5, "activation": 2.0})
    ids = torch.from_numpy(TOKENS.batch(1, 0, 2, 24, 5))
    with torch.no_grad():
        teacher = tiny_model(ids, placement="fa*3", output_mixer_outputs=True)
        student = tiny_model(ids, placement="fa gdn swa", output_mixer_outputs=True)
        kl = forward_kl(student.logits, teacher.logits).item()
        activation = activation_matching(student.mixer_outputs[1:], teacher.mixer_outputs[1:]).item()
    result = trainer.train_step(1)
    assert result.forward_kl == pytest.approx(kl, rel=1e-5)
    assert result.activation == pytest.approx(activation, rel=1e-5)
    assert result.loss == pytest.approx(0.5 * kl + 2 * activation, rel=1e-5)
    assert result.tokens == 2 * 24


def test_micro_batches_and_shared_teacher_passes_average_the_gradient(make_trainer, placed):
    """Two passes over what one pass sees must give its gradient, not twice it."""
    placed("gdn kda swa")
    gradients = []
    for changes in ({}, {"placements_per_batch": 2}):
        trainer = make_trainer(gradient_clip=1e9, **changes)
        trainer.optimizer.zero_grad()
        assert len(list(trainer._distill(1, 0))) == changes.get("placements_per_batch", 1)
        gradients.append({name: p.grad for name, p in trainer.trained.items() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_a_step_counts_all_its_passes(make_trainer):
    result = make_trainer(micro_batches=2, placements_per_batch=3).train_step(1)
    assert len(result.placements) == 6
    assert len(set(result.placements)) > 1
    assert result.tokens == 2 * 2 * 24


def test_one_teacher_pass_serves_a_micro_batch(make_trainer, monkeypatch):
    trainer = make_trainer(placements_per_batch=3)
    calls = []
    run = trainer._run_teacher
    monkeypatch.setattr(trainer, "_run_teacher", lambda ids: calls.append(1) or run(ids))
    trainer.train_step(1)
    assert len(calls) == 1


def test_the_gradient_is_clipped(make_trainer):
    trainer = make_trainer(gradient_clip=1e-3)
    result = trainer.train_step(1)
    total = sum(p.grad.square().sum() for p in trainer.trained.values() if p.grad is not None) ** 0.5
    assert result.gradient_norm > 1e-3
    assert float(total) == pytest.approx(1e-3, rel=1e-3)


def test_losses_fall(make_trainer, placed):
    placed("swa kda gdn")
    trainer = make_trainer(steps=30, batch_size=4, learning_rate=1e-2)
    losses = [trainer.train_step(step).loss for step in range(1, 31)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_divergence_names_step_and_placement_and_moves_nothing(make_trainer, placed, poison):
    placed("gdn fa kda")
    trainer = make_trainer()
    with torch.no_grad():
        next(p for name, p in trainer.trained.items() if "gated_delta_net.out_proj" in name)[0, 0] = poison
    before = weights(trainer)
    with pytest.raises(DivergedError, match=r"loss of step 7 .*\(gdn fa kda\)"):
        trainer.train_step(7)
    assert all(torch.equal(v.nan_to_num(), before[n].nan_to_num()) for n, v in weights(trainer).items())


def test_a_gradient_that_is_not_finite_is_divergence_too(make_trainer, placed, monkeypatch):
    placed("gdn fa kda")
    trainer = make_trainer()
    monkeypatch.setattr(
        trainer_module.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.tensor(float("inf"))
    )
    with pytest.raises(DivergedError, match="gradient of step 2"):
        trainer.train_step(2)


def test_only_projections_decay(make_trainer):
    trainer = make_trainer()
    decayed = {name.split("mixers.")[1] for name, p in trainer.trained.items() if takes_weight_decay(name, p)}
    assert "gated_delta_net.in_proj_qkvz.weight" in decayed
    assert "sliding_attention.o_proj.weight" in decayed
    assert "kimi_delta_attention.f_a_proj.weight" in decayed
    assert not any(part in name for name in decayed for part in ("norm", "conv", "A_log", "dt_bias"))
