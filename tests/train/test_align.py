from __future__ import annotations

import numpy as np
import pytest
import torch

from gearshift.placement import FULL_ATTENTION, PlacementError
from gearshift.train.align import mixer_losses, observe_teacher
from gearshift.train.data import PackedTokens
from gearshift.train.trainer import DivergedError, Trainer
from tests.supernet.tools import only_holding

TOKENS = PackedTokens(np.random.default_rng(0).integers(0, 257, 2000, dtype=np.int32))
IDS = torch.from_numpy(TOKENS.batch(1, 0, 2, 24, 5))


@pytest.fixture
def make_trainer(tiny_model, make_recipe):
    return lambda **changes: Trainer(tiny_model, TOKENS, make_recipe(**({"align_steps": 6} | changes)))


def test_the_observed_outputs_are_the_teacher_s(tiny_model):
    observed = observe_teacher(tiny_model, IDS)
    outputs = tiny_model(IDS, placement="fa*3", output_mixer_outputs=True).mixer_outputs
    assert all(torch.equal(seen.output_BTD, output) for seen, output in zip(observed, outputs, strict=True))


def test_nothing_stays_attached_to_the_model(tiny_model):
    observe_teacher(tiny_model, IDS)
    assert all(not layer.mixers[FULL_ATTENTION]._forward_hooks for layer in tiny_model.model.layers)
    with pytest.raises(IndexError):
        observe_teacher(tiny_model, IDS + 1000)
    assert all(not layer.mixers[FULL_ATTENTION]._forward_hooks for layer in tiny_model.model.layers)


def test_losses_are_those_of_placements_that_change_one_layer_alone(tiny_model):
    """With full attention elsewhere, a layer sees in the placement just what it sees in the teacher."""
    teacher = tiny_model(IDS, placement="fa*3", output_mixer_outputs=True).mixer_outputs
    losses = dict(mixer_losses(tiny_model, observe_teacher(tiny_model, IDS)))
    assert len(losses) == 9
    for name, loss in losses.items():
        short, layer = name.split(" in layer ")
        placement = ["fa"] * 3
        placement[int(layer)] = short
        output = tiny_model(IDS, placement=" ".join(placement), output_mixer_outputs=True).mixer_outputs
        error, size = (
            x.norm(dim=-1) for x in (output[int(layer)] - teacher[int(layer)], teacher[int(layer)])
        )
        assert loss.item() == pytest.approx((error / size).mean().item(), rel=1e-4)


HELD = (
    ("full_attention", "kimi_delta_attention"),
    ("full_attention",),
    ("full_attention", "gated_delta_net"),
)


def test_layers_align_the_mixers_that_they_hold(tiny_model, make_recipe):
    """The loss is a mean over those: no layer waits for a mixer that it lacks."""
    thin = only_holding(tiny_model, HELD)
    trainer = Trainer(thin, TOKENS, make_recipe(align_steps=1))
    trainer._batch = lambda step, micro_batch: IDS
    whole = dict(mixer_losses(tiny_model, observe_teacher(tiny_model, IDS)))
    losses = dict(mixer_losses(thin, observe_teacher(thin, IDS)))
    assert list(losses) == ["kda in layer 0", "gdn in layer 2"]
    assert all(torch.equal(loss, whole[name]) for name, loss in losses.items())
    mean = torch.stack(list(losses.values())).mean()
    mean.backward()
    expected = torch.stack([p.grad.norm() for p in trainer.trained.values() if p.grad is not None]).norm()
    result = trainer.train_step(1)
    assert result.loss == pytest.approx(mean.item())
    assert result.gradient_norm == pytest.approx(expected.item(), rel=1e-4)


def test_a_model_without_its_teacher_has_nothing_to_align_with(tiny_model):
    with pytest.raises(PlacementError, match="no full_attention in layers 1: the teacher is none of"):
        observe_teacher(only_holding(tiny_model, [HELD[0], ("gated_delta_net",), HELD[2]]), IDS)


def test_every_trained_mixer_learns_in_one_step(make_trainer):
    trainer = make_trainer()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    result = trainer.train_step(1)
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    # The inner halves of low-rank gates start to move once their outer halves, zero at first, have moved.
    assert moved == {name for name in trainer.trained if "f_a_proj" not in name and "g_a_proj" not in name}
    assert all(parameter.grad is not None for parameter in trainer.trained.values())
    assert (result.stage, result.forward_kl, result.placements) == ("align", None, ())
    assert result.loss == result.activation > 0


def test_the_stage_changes_after_the_align_steps(make_trainer):
    trainer = make_trainer(align_steps=2)
    results = [trainer.train_step(step) for step in (1, 2, 3)]
    assert [result.stage for result in results] == ["align", "align", "distill"]
    assert results[2].forward_kl is not None


def test_micro_batches_average_the_gradient(make_trainer, monkeypatch):
    norms = []
    for micro_batches in (1, 2):
        trainer = make_trainer(micro_batches=micro_batches, learning_rate=1e-12)
        monkeypatch.setattr(trainer, "_batch", lambda step, micro_batch: IDS)
        norms.append(trainer.train_step(1).gradient_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_losses_fall(make_trainer):
    trainer = make_trainer(steps=30, align_steps=30, learning_rate=1e-2)
    losses = [trainer.train_step(step).loss for step in range(1, 31)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_divergence_names_the_mixer_and_its_layer(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.trained["model.layers.1.mixers.kimi_delta_attention.o_proj.weight"].fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"loss of step 3 .*\(kda in layer 1\)"):
        trainer.train_step(3)
