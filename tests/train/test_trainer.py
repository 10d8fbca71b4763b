"""One optimiser step: what moves, what is reported, and what it is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from gearshift.placement import FULL_ATTENTION, Placement
from gearshift.train.losses import activation_matching, token_weights
from gearshift.train.sampling import Sampler
from gearshift.train.trainer import DivergedError, takes_weight_decay
from tests.train.tools import random_batch

BATCH = random_batch(seed=5)


@pytest.fixture
def placed(monkeypatch):
    """Let a test choose the placement of every student pass."""

    def choose(text: str) -> None:
        monkeypatch.setattr(Sampler, "draw", lambda *args, **kwargs: Placement.parse(text))

    return choose


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def changed(trainer, before):
    return {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}


def test_only_the_placement_s_mixers_move(make_trainer, placed):
    placed("swa fa gdn")
    trainer = make_trainer(weight_decay=0.1)
    before = weights(trainer)
    for step in (1, 2):
        trainer.train_step(step, [BATCH])
    moved = {name.split(".weight")[0] for name in changed(trainer, before)}
    assert moved
    allowed = ("model.layers.0.mixers.sliding_attention.", "model.layers.2.mixers.gated_delta_net.")
    assert all(name.startswith(allowed) for name in moved)


def test_a_mixer_that_was_once_used_then_rests(make_trainer, placed):
    """AdamW's momentum and decay must not move a mixer in steps that do not use it."""
    trainer = make_trainer(weight_decay=0.1)
    placed("kda kda kda")
    trainer.train_step(1, [BATCH])
    placed("swa swa swa")
    before = weights(trainer)
    trainer.train_step(2, [BATCH])
    assert all("sliding_attention" in name for name in changed(trainer, before))


def test_full_attention_and_shared_weights_are_frozen(make_trainer):
    trainer = make_trainer()
    names = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
    assert set(trainer.trained).isdisjoint(names)
    assert all(f".mixers.{FULL_ATTENTION}." in name or ".mixers." not in name for name in names)
    assert all(".mixers." in name and FULL_ATTENTION not in name for name in trainer.trained)


@pytest.mark.parametrize("packed", [False, True], ids=["stream", "documents"])
def test_reported_losses_are_those_of_the_formulas(make_trainer, placed, tiny_model, packed):
    placed("fa gdn swa")
    batch = random_batch(seed=5, lengths=(7, 12, 5) if packed else ())
    weight = {"forward_kl": 0.5, "reverse_kl": 0.3, "cross_entropy": 0.2, "activation": 2.0}
    trainer = make_trainer(losses=weight)
    with torch.no_grad():
        teacher, student = (
            tiny_model(batch.input_ids, placement=p, output_mixer_outputs=True, cu_seqlens=batch.cu_seqlens)
            for p in ("fa*3", "fa gdn swa")
        )
        log_p, log_q = (
            torch.log_softmax(out.logits[batch.counted].double(), -1) for out in (teacher, student)
        )
        expected = {
            "forward_kl": (log_p.exp() * (log_p - log_q)).sum(-1).mean().item(),
            "reverse_kl": (log_q.exp() * (log_q - log_p)).sum(-1).mean().item(),
            "cross_entropy": functional.nll_loss(log_q, batch.targets[batch.counted]).item(),
            "activation": activation_matching(
                student.mixer_outputs[1:],
                teacher.mixer_outputs[1:],
                token_weights(batch.counted, student.logits.flatten(0, 1)),
            ).item(),
        }
    result = trainer.train_step(1, [batch])
    assert result.terms == pytest.approx(expected, rel=1e-4)
    assert result.loss == pytest.approx(sum(weight[name] * expected[name] for name in weight), rel=1e-4)
    assert result.counted == int(batch.counted.sum())
    assert result.layers[0] is None


def test_documents_of_a_row_do_not_touch_each_other(make_trainer, placed):
    """The loss of packed documents is the mean of what each of them has alone."""
    placed("gdn swa kda")
    together = random_batch(rows=1, seed=7, lengths=(9, 15))
    ids = together.input_ids[0].numpy()
    alone = []
    for piece in (ids[:9], ids[9:]):
        single = random_batch(rows=1, length=len(piece), lengths=[len(piece)])
        single.input_ids[0] = torch.from_numpy(piece)
        single.targets[0, :-1] = torch.from_numpy(piece[1:])
        alone.append(make_trainer().train_step(1, [single]).loss * (len(piece) - 1))
    assert make_trainer().train_step(1, [together]).loss == pytest.approx(sum(alone) / 22, rel=1e-5)


def test_mixer_weights_change_the_loss_but_not_the_distances(make_trainer, placed):
    placed("swa gdn kda")
    losses = {"forward_kl": 0, "activation": 1.0}
    plain = make_trainer(losses=losses).train_step(1, [BATCH])
    weighed = make_trainer(losses=losses | {"mixers": {"gdn": 3.0, "kda": 0.0}}).train_step(1, [BATCH])
    distances = {name: values["activation"] for name, values in plain.mixers.items()}
    assert {name: values["activation"] for name, values in weighed.mixers.items()} == distances
    assert plain.loss == pytest.approx(sum(distances.values()) / 3, rel=1e-5)
    assert weighed.loss == pytest.approx((distances["swa"] + 3 * distances["gdn"]) / 3, rel=1e-5)


def test_a_step_is_the_same_however_it_is_cut_into_micro_batches(make_trainer, placed):
    """Even where micro-batches count different numbers of tokens."""
    placed("gdn kda swa")
    parts = [random_batch(rows=1, seed=1), random_batch(rows=1, seed=2, lengths=(6, 6, 6, 6))]
    cut = make_trainer(micro_batches=2, batch_size=1).train_step(1, parts)
    singles = [make_trainer(batch_size=1).train_step(1, [part]) for part in parts]
    assert cut.counted == 23 + 20
    mean = (singles[0].loss * 23 + singles[1].loss * 20) / 43
    assert cut.loss == pytest.approx(mean, rel=1e-5)


def test_shared_teacher_passes_average_the_gradient(make_trainer, placed):
    placed("gdn kda swa")
    one = make_trainer().train_step(1, [BATCH])
    several = make_trainer(placements_per_batch=3).train_step(1, [BATCH])
    assert several.loss == pytest.approx(one.loss, rel=1e-5)
    assert several.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)


def test_a_step_counts_all_its_passes(make_trainer):
    result = make_trainer(micro_batches=2, placements_per_batch=3).train_step(
        1, [BATCH, random_batch(seed=6)]
    )
    assert sum(result.placements.values()) == 6
    assert len(result.placements) > 1
    assert result.tokens == 2 * 2 * 24


def test_one_teacher_pass_serves_a_micro_batch_and_none_where_nothing_needs_it(make_trainer, monkeypatch):
    def teacher_passes(**changes):
        trainer, calls = make_trainer(**changes), []
        run = trainer.model.hidden_states
        monkeypatch.setattr(
            trainer.model,
            "hidden_states",
            lambda ids, names, borders=None: calls.append(names) or run(ids, names, borders),
        )
        trainer.train_step(1, [BATCH])
        return calls.count([FULL_ATTENTION] * 3)

    assert teacher_passes(placements_per_batch=3) == 1
    assert teacher_passes(losses={"forward_kl": 0, "activation": 0, "cross_entropy": 1}) == 0


def test_the_gradient_is_clipped(make_trainer):
    trainer = make_trainer(gradient_clip=1e-3)
    result = trainer.train_step(1, [BATCH])
    total = sum(p.grad.square().sum() for p in trainer.trained.values() if p.grad is not None) ** 0.5
    assert result.gradient_norm > 1e-3
    assert float(total) == pytest.approx(1e-3, rel=1e-3)
    by_mixer = [values["gradient_norm"] for values in result.mixers.values()]
    assert result.gradient_norm == pytest.approx(float(np.linalg.norm(by_mixer)), rel=1e-5)


def test_losses_fall(make_trainer, placed):
    placed("swa kda gdn")
    trainer = make_trainer(steps=30, learning_rate=1e-2)
    losses = [trainer.train_step(step, [random_batch(rows=4, seed=step % 3)]).loss for step in range(1, 31)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_divergence_names_step_and_placement_and_moves_nothing(make_trainer, placed, poison):
    placed("gdn fa kda")
    trainer = make_trainer()
    with torch.no_grad():
        next(p for name, p in trainer.trained.items() if "gated_delta_net.out_proj" in name)[0, 0] = poison
    before = weights(trainer)
    with pytest.raises(DivergedError, match=r"loss of step 6 .*\(gdn fa kda\)"):
        trainer.train_step(6, [BATCH])
    assert all(torch.equal(v.nan_to_num(), before[n].nan_to_num()) for n, v in weights(trainer).items())


def test_a_gradient_that_is_not_finite_is_divergence_too(make_trainer, placed, monkeypatch):
    placed("gdn fa kda")
    trainer = make_trainer()
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda gradients: torch.tensor(float("inf")))
    with pytest.raises(DivergedError, match="gradient of step 2"):
        trainer.train_step(2, [BATCH])


def test_only_projections_decay(make_trainer):
    trainer = make_trainer()
    decayed = {name.split("mixers.")[1] for name, p in trainer.trained.items() if takes_weight_decay(name, p)}
    assert "gated_delta_net.in_proj_qkvz.weight" in decayed
    assert "sliding_attention.o_proj.weight" in decayed
    assert "kimi_delta_attention.f_a_proj.weight" in decayed
    assert not any(part in name for name in decayed for part in ("norm", "conv", "A_log", "dt_bias"))


def test_bfloat16_trains_float32_weights(make_trainer, placed):
    placed("swa gdn kda")
    full, half = make_trainer(), make_trainer(precision="bf16")
    one, other = full.train_step(1, [BATCH]), half.train_step(1, [BATCH])
    assert one.loss != other.loss
    assert other.loss == pytest.approx(one.loss, rel=0.02)
    kinds = {p.dtype for p in half.trained.values()}
    frozen = {p.dtype for p in half.model.parameters() if not p.requires_grad and p.dim() >= 2}
    assert (kinds, frozen) == ({torch.float32}, {torch.bfloat16})
    assert all(s["exp_avg"].dtype == torch.float32 for s in half.optimizer.state.values())
