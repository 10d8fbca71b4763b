"""Alignment, recomputation and frozen copies of the teacher's attention."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gearshift.supernet import save_supernet
from gearshift.train.layers import TEACHER_ATTENTION
from gearshift.train.trainer import DivergedError
from tests.supernet.tools import only_holding
from tests.train.tools import random_batch

BATCH = random_batch()


def test_alignment_is_that_of_placements_that_change_one_layer_alone(make_trainer, tiny_model):
    """With full attention elsewhere, a layer sees in the placement just what it sees in the teacher."""
    ids, counted = BATCH.input_ids, BATCH.counted
    teacher = tiny_model(ids, placement="fa*3", output_mixer_outputs=True).mixer_outputs
    result = make_trainer("align").train_step(1, [BATCH])
    expected = np.zeros((3, 3))
    for layer in range(3):
        for column, short in enumerate(("swa", "gdn", "kda")):
            placement = ["fa"] * 3
            placement[layer] = short
            output = tiny_model(ids, placement=" ".join(placement), output_mixer_outputs=True).mixer_outputs
            error, size = (x[counted].norm(dim=-1) for x in (output[layer] - teacher[layer], teacher[layer]))
            expected[layer, column] = (error / size).mean().item()
    assert result.loss == pytest.approx(expected.mean(), rel=1e-4)
    assert result.terms == {"activation": pytest.approx(expected.mean(), rel=1e-4)}
    assert result.layers == pytest.approx(expected.mean(1).tolist(), rel=1e-4)
    by_mixer = {name: values["activation"] for name, values in result.mixers.items()}
    assert [by_mixer[name] for name in ("swa", "gdn", "kda")] == pytest.approx(
        expected.mean(0).tolist(), rel=1e-4
    )


def test_every_trained_mixer_learns_in_one_step(make_trainer):
    trainer = make_trainer("align")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    result = trainer.train_step(1, [BATCH])
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    # The inner halves of low-rank gates start to move once their outer halves, zero at first, have moved.
    assert moved == {name for name in trainer.trained if "f_a_proj" not in name and "g_a_proj" not in name}
    assert (result.stage, result.placements) == ("align", {})


def test_layers_align_the_mixers_that_they_hold(make_trainer, tiny_model, supernet_directory, tmp_path):
    held = (
        ("full_attention", "kimi_delta_attention"),
        ("full_attention",),
        ("full_attention", "gated_delta_net"),
    )
    thin = save_supernet(only_holding(tiny_model, held), tmp_path / "thin", source=supernet_directory)
    whole = make_trainer("align").train_step(1, [BATCH])
    result = make_trainer("align", supernet=thin).train_step(1, [BATCH])
    assert list(result.mixers) == ["gdn", "kda"]
    assert result.layers[1] is None
    mean = (result.mixers["kda"]["activation"] + result.mixers["gdn"]["activation"]) / 2
    assert result.loss == pytest.approx(mean)
    assert 0 < result.loss != whole.loss


def test_alignment_lowers_its_loss(make_trainer):
    trainer = make_trainer("align", steps=30, learning_rate=1e-2)
    losses = [trainer.train_step(step, [random_batch(seed=step)]).loss for step in range(1, 31)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_divergence_names_the_mixer_and_its_layer(make_trainer):
    trainer = make_trainer("align")
    with torch.no_grad():
        trainer.trained["model.layers.1.mixers.kimi_delta_attention.o_proj.weight"].fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"loss of step 3 .*\(kda in layer 1\)"):
        trainer.train_step(3, [BATCH])


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_recomputing_layers_changes_nothing_but_memory(make_trainer, stage):
    plain = make_trainer(stage)
    again = make_trainer(stage, scale={"activation_checkpointing": True})
    one, other = plain.train_step(1, [BATCH]), again.train_step(1, [BATCH])
    assert other == one
    for name, parameter in plain.trained.items():
        assert torch.equal(again.trained[name], parameter)


def test_recomputing_keeps_less_for_the_backward_pass(make_trainer, monkeypatch):
    """Counted between the forward and the backward pass: what a layer's graph holds on to."""

    def kept(**changes):
        sizes = []
        passes = make_trainer(**changes).passes
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            passes.model.hidden_states(BATCH.input_ids, ["gated_delta_net"] * 3)
        return sum(sizes)

    assert kept(scale={"activation_checkpointing": True}) < 0.2 * kept()


def test_a_compiled_ffn_computes_the_same(make_trainer, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, *args, **kwargs: compiled.append(type(self).__name__)
    )
    make_trainer(scale={"compile": True})
    assert len(compiled) == 3


def test_where_attention_is_trained_the_teacher_stays_what_it_was(make_trainer, tiny_model):
    trainer = make_trainer(trained="mixers_and_attention", sampling={"presets": {"fa*3": 1.0}})
    before = tiny_model(BATCH.input_ids, placement="fa*3").logits
    first = trainer.train_step(1, [BATCH])
    assert first.loss == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for name, parameter in trainer.trained.items():
            if "full_attention" in name:
                parameter.mul_(1.5)
    with torch.no_grad():
        hidden, _ = trainer.model.hidden_states(BATCH.input_ids, [TEACHER_ATTENTION] * 3)
        assert torch.equal(trainer.model.lm_head(hidden), before)
    second = trainer.train_step(2, [BATCH])
    assert second.loss > 0.01
    assert second.mixers["fa"]["gradient_norm"] > 0
