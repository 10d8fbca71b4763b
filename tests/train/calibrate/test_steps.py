from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gearshift.placement import GATED_DELTA_NET, SLIDING_ATTENTION
from gearshift.supernet.mixers import MIXER_CLASSES, Mixer
from gearshift.train.calibrate.layers import plain_context
from gearshift.train.calibrate.steps import Batch, StepSchedule, take_steps
from gearshift.train.schedule import learning_rate
from tests.supernet.tools import randomize, tiny_config
from tests.train.calibrate.tools import CPU, relative_error, tiny_settings

TOKENS = 12
counts = st.integers(1, 2000)


def test_the_schedule_rises_for_a_tenth_and_falls_to_a_tenth():
    """A linear rise, then half a cosine: written out once more."""
    schedule = StepSchedule(200, 0.5)
    for step in range(1, 21):
        assert learning_rate(schedule, step) == pytest.approx(0.5 * step / 20)
    for step in range(21, 201):
        expected = 0.05 + 0.45 * (0.5 + 0.5 * math.cos(math.pi * (step - 20) / 180))
        assert learning_rate(schedule, step) == pytest.approx(expected)


@given(counts, st.floats(1e-6, 1))
def test_no_step_is_too_large_or_nothing(steps: int, largest: float):
    schedule = StepSchedule(steps, largest)
    rates = [learning_rate(schedule, step) for step in range(1, steps + 1)]
    assert 0 < min(rates) <= max(rates) <= largest * (1 + 1e-9)
    assert rates[-1] == pytest.approx(largest / 10)
    assert all(a >= b for a, b in itertools.pairwise(rates[schedule.warmup_steps :]))


@given(counts)
def test_the_mixer_is_judged_after_the_last_step_and_a_few_times_before(steps: int):
    checks = StepSchedule(steps, 1).checks
    assert steps in checks
    assert len(checks) == min(4, steps)
    assert min(checks) >= 1
    assert max(checks) == steps


def test_the_learning_rate_is_one_over_the_width_where_none_is_given():
    assert StepSchedule.of(tiny_settings(learning_rate=None, steps=7), 64) == StepSchedule(7, 1 / 64)
    assert StepSchedule.of(tiny_settings(learning_rate=0.25, steps=7), 64) == StepSchedule(7, 0.25)


def make(name: str = GATED_DELTA_NET, seed: int = 0) -> Mixer:
    torch.manual_seed(seed)
    config = tiny_config()
    mixer = MIXER_CLASSES[name](config, config.mixer_config(name))
    randomize(mixer)
    return mixer


def batch_of(step: int) -> Batch:
    """What another mixer, sliding attention, makes of random inputs."""
    x = torch.randn(2, TOKENS, 32, generator=torch.Generator().manual_seed(step))
    context = plain_context(tiny_config(), TOKENS, CPU)
    with torch.no_grad():
        return x, context, make(SLIDING_ATTENTION, 1)(x, context, None)


def error_of(mixer: Mixer) -> float:
    x, context, targets = batch_of(10_000)
    with torch.no_grad():
        return relative_error(mixer(x, context, None), targets)


def weights(mixer: Mixer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in mixer.named_parameters()}


def take(
    mixer: Mixer,
    schedule: StepSchedule,
    batch: Callable[[int], Batch] = batch_of,
    judged: Callable[[], float] = lambda: 0.0,
    start_error: float = 1.0,
) -> tuple[str | None, list[tuple[int, float]]]:
    told: list[tuple[int, float]] = []
    stopped = take_steps(
        mixer, schedule, batch, judged, start_error, lambda step, error: told.append((step, error))
    )
    return stopped, told


def test_steps_bring_a_mixer_nearer():
    mixer = make()
    before, weights_before = error_of(mixer), weights(mixer)
    stopped, told = take(mixer, StepSchedule(60, 1e-2))
    assert stopped is None
    assert [step for step, _ in told] == list(range(1, 61))
    assert error_of(mixer) < 0.8 * before
    assert all(not torch.equal(value, weights_before[name]) for name, value in weights(mixer).items())


def test_steps_are_those_of_a_plain_loop():
    """AdamW written out (arXiv 1711.05101), with the gradient of the relative error cut to a norm of 0.3."""
    fast, slow = make(), make()
    _, told = take(fast, StepSchedule(6, 1e-2))
    parameters = list(slow.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    for step in range(1, 7):
        x, context, targets = batch_of(step)
        loss = ((slow(x, context, None) - targets).norm(dim=-1) / targets.norm(dim=-1)).mean()
        assert told[step - 1] == (step, pytest.approx(loss.item(), rel=1e-4))
        gradients = torch.autograd.grad(loss, parameters)
        norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
        rate = 1e-2 * (0.1 + 0.45 * (1 + math.cos(math.pi * step / 6)))
        with torch.no_grad():
            for parameter, gradient, (first, second) in zip(parameters, gradients, moments, strict=True):
                cut = gradient * min(1, 0.3 / norm)
                first.mul_(0.9).add_(0.1 * cut)
                second.mul_(0.95).add_(0.05 * cut.square())
                mean, square = first / (1 - 0.9**step), second / (1 - 0.95**step)
                parameter.sub_(rate * mean / (square.sqrt() + 1e-8))
    for name, value in fast.named_parameters():
        torch.testing.assert_close(value, slow.get_parameter(name), rtol=1e-3, atol=3e-4)


def test_it_is_judged_when_it_shall_be():
    mixer, seen = make(), []

    def judge() -> float:
        seen.append(weights(mixer)["out_proj.weight"])
        return 1.0

    _, told = take(mixer, StepSchedule(10, 1e-3), judged=judge)
    assert len(told) == 10
    assert len(seen) == 4
    assert torch.equal(seen[-1], weights(mixer)["out_proj.weight"])


@pytest.mark.parametrize(
    ("error", "start", "steps"), [(2.01, 1.0, 3), (2.0, 1.0, 10), (float("nan"), 1.0, 3), (7, math.inf, 10)]
)
def test_growing_errors_end_it(error: float, start: float, steps: int):
    stopped, told = take(make(), StepSchedule(10, 1e-3), judged=lambda: error, start_error=start)
    assert len(told) == steps
    assert stopped == (None if steps == 10 else f"after step 3 the error was {error:.3f}")


@pytest.mark.parametrize("poison", ["targets", "inputs"])
def test_what_is_not_finite_ends_it_before_anything_moves(poison: str):
    def batch(step: int) -> Batch:
        x, context, targets = batch_of(step)
        if step == 3:
            (targets if poison == "targets" else x)[0, 1, 2] = float("nan")
        return x, context, targets

    mixer, clean = make(), make()
    stopped, told = take(mixer, StepSchedule(10, 1e-3), batch)
    assert stopped == "step 3 gave an error or a gradient that is not finite"
    assert [step for step, _ in told] == [1, 2]
    take(clean, StepSchedule(10, 1e-3), lambda step: batch_of(step) if step < 3 else batch(3))
    assert all(torch.equal(value, clean.get_parameter(name)) for name, value in mixer.named_parameters())
    assert all(value.isfinite().all() for value in mixer.parameters())


def test_only_the_mixer_learns():
    x, context, targets = batch_of(1)
    x.requires_grad_()
    targets.requires_grad_()
    take(make(), StepSchedule(2, 1e-3), lambda step: (x, context, targets))
    assert targets.grad is None
    assert torch.equal(x.detach(), batch_of(1)[0])
    assert torch.equal(targets.detach(), batch_of(1)[2])


def test_a_frozen_mixer_is_thawed():
    mixer = make().requires_grad_(False)
    before = weights(mixer)
    take(mixer, StepSchedule(2, 1e-3))
    assert not torch.equal(weights(mixer)["A_log"], before["A_log"])
