"""Ridge regression against least squares of the stacked equations, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gearshift.placement import FULL_ATTENTION, GATED_DELTA_NET, KIMI_DELTA_ATTENTION, SLIDING_ATTENTION
from gearshift.supernet import SequenceContext
from gearshift.supernet.mixers import MIXER_CLASSES, Mixer
from gearshift.train.calibrate.layers import plain_context
from gearshift.train.calibrate.ridge import NormalEquations, fit_output_projection, output_projection
from tests.supernet.tools import MIXER_SIZES, randomize, tiny_config
from tests.train.calibrate.tools import CPU, relative_error

HIDDEN, TOKENS = 32, 30
NAMES = (SLIDING_ATTENTION, GATED_DELTA_NET, KIMI_DELTA_ATTENTION)
each_mixer = pytest.mark.parametrize("name", NAMES)
# Delta rules have no bias there.
with_and_without_bias = pytest.mark.parametrize(
    ("name", "biases"), [*((name, ()) for name in NAMES), (SLIDING_ATTENTION, ("o_proj",))]
)
ridges = st.floats(1e-6, 1e3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def best_weights(prior_DF: Tensor, f_NF: Tensor, y_ND: Tensor, weights_N: Tensor, ridge: float) -> Tensor:
    """Every token is one equation, and so is every weight's wish to stay: all of them at once."""
    f_NF, y_ND, prior_DF = (x.double() for x in (f_NF, y_ND, prior_DF))
    f_NF, y_ND = f_NF * weights_N[:, None].double(), y_ND * weights_N[:, None].double()
    held = (ridge * f_NF.square().sum() / f_NF.shape[1]).sqrt()
    equations = torch.cat([f_NF, held * torch.eye(f_NF.shape[1], dtype=torch.float64)])
    return torch.linalg.lstsq(equations, torch.cat([y_ND, held * prior_DF.T])).solution.T


def added(
    prior_DF: Tensor, f_NF: Tensor, y_ND: Tensor, weights_N: Tensor, sizes: list[int]
) -> NormalEquations:
    equations = NormalEquations(prior_DF)
    for parts in zip(f_NF.split(sizes), y_ND.split(sizes), weights_N.split(sizes), strict=True):
        equations.add(*parts)
    return equations


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 5),
    ridge=ridges,
    seed=st.integers(0, 999),
)
def test_it_solves_the_stacked_equations_however_they_are_split(
    sizes: list[int], inputs: int, outputs: int, ridge: float, seed: int
):
    tokens = sum(sizes)
    prior, f, y = (
        normal(outputs, inputs, seed=seed),
        normal(tokens, inputs, seed=seed + 1),
        normal(tokens, outputs, seed=seed + 2),
    )
    weights = 0.1 + normal(tokens, seed=seed + 3).abs()
    solved = added(prior, f, y, weights, sizes).solve(ridge)
    assert solved.dtype == torch.float64
    torch.testing.assert_close(solved, best_weights(prior, f, y, weights, ridge), rtol=1e-6, atol=1e-8)


def test_no_other_weights_have_a_smaller_sum():
    prior, f, y, weights = (
        normal(3, 4),
        normal(20, 4, seed=1),
        normal(20, 3, seed=2),
        normal(20, seed=3).abs(),
    )
    ridge = 0.1
    held = ridge * (f * weights[:, None]).double().square().sum() / 4

    def total(w_DF: Tensor) -> float:
        errors = (f.double() @ w_DF.T - y).square().sum(1) * weights.double() ** 2
        return float(errors.sum() + held * (w_DF - prior).square().sum())

    best = added(prior, f, y, weights, [20]).solve(ridge)
    for seed in range(20):
        assert total(best + 1e-3 * normal(3, 4, seed=seed).double()) > total(best)


def test_without_a_ridge_to_speak_of_it_is_least_squares():
    f, y = normal(50, 6, seed=1), normal(50, 3, seed=2)
    solved = added(normal(3, 6), f, y, torch.ones(50), [50]).solve(1e-12)
    torch.testing.assert_close(solved.T, torch.linalg.lstsq(f.double(), y.double()).solution)


def test_a_huge_ridge_keeps_what_was_there():
    prior = normal(3, 6)
    solved = added(prior, normal(50, 6, seed=1), normal(50, 3, seed=2), torch.ones(50), [50]).solve(1e12)
    torch.testing.assert_close(solved, prior.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inputs", [torch.zeros(5, 6), torch.full((5, 6), float("nan")), None])
def test_inputs_that_say_nothing_keep_what_was_there(inputs: Tensor | None):
    equations, prior = NormalEquations(normal(3, 6)), normal(3, 6)
    if inputs is not None:
        equations.add(inputs, normal(5, 3, seed=1), torch.ones(5))
    assert torch.equal(equations.solve(1e-3), prior.double())


def test_a_ridge_too_small_to_tell_keeps_what_was_there():
    """Two inputs that are always the same, and nothing added that a float64 could hold."""
    column = normal(50, 1, seed=1)
    equations = added(normal(3, 2), column.expand(50, 2), normal(50, 3, seed=2), torch.ones(50), [50])
    assert torch.equal(equations.solve(1e-30), normal(3, 2).double())
    assert not torch.equal(equations.solve(1e-6), normal(3, 2).double())


def make(name: str, biases: tuple[str, ...] = ()) -> Mixer:
    torch.manual_seed(2)
    sizes: dict[str, Any] = dict(MIXER_SIZES)
    if biases:
        sizes[name] = sizes[name] | {"biases": list(biases)}
    config = tiny_config(sizes=sizes)
    mixer = MIXER_CLASSES[name](config, config.mixer_config(name))
    randomize(mixer)
    return mixer.eval()


def projection_of(mixer: Mixer) -> nn.Linear:
    projection = output_projection(mixer)
    assert projection is not None
    return projection


def batches(targets_of: Any, count: int = 6) -> list[tuple[Tensor, SequenceContext, Tensor]]:
    context = plain_context(tiny_config(), TOKENS, CPU)
    given = [normal(2, TOKENS, HIDDEN, seed=seed) for seed in range(count)]
    return [(x, context, targets_of(x, context, seed)) for seed, x in enumerate(given)]


def random_targets(x: Tensor, context: SequenceContext, seed: int) -> Tensor:
    """Tokens of very different sizes, partly what a linear map of the inputs gives."""
    sizes = normal(2, TOKENS, 1, seed=seed + 100).exp()
    return sizes * (normal(2, TOKENS, HIDDEN, seed=seed + 200) + x @ normal(HIDDEN, HIDDEN, seed=9) / 6)


@with_and_without_bias
@torch.no_grad()
def test_a_known_projection_is_found(name: str, biases: tuple[str, ...]):
    target, mixer = make(name, biases), make(name, biases)
    projection_of(mixer).weight.copy_(normal(*projection_of(mixer).weight.shape, seed=7))
    given = batches(lambda x, context, seed: target(x, context, None))
    assert relative_error(mixer(*given[0][:2], None), given[0][2]) > 0.5
    assert fit_output_projection(mixer, given, 1e-10)
    torch.testing.assert_close(
        projection_of(mixer).weight, projection_of(target).weight, rtol=1e-3, atol=1e-3
    )
    assert relative_error(mixer(*given[0][:2], None), given[0][2]) < 1e-4


@with_and_without_bias
@torch.no_grad()
def test_each_token_counts_by_its_relative_error(name: str, biases: tuple[str, ...]):
    mixer, given = make(name, biases), batches(random_targets)
    projection = projection_of(mixer)
    seen: list[Tensor] = []
    hook = projection.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for x, context, _ in given:
        mixer(x, context, None)
    hook.remove()
    f_NF, y_ND = torch.cat(seen).flatten(0, 1), torch.cat([targets for *_, targets in given]).flatten(0, 1)
    weights_N = 1 / y_ND.norm(dim=1)
    wanted = y_ND if projection.bias is None else y_ND - projection.bias
    expected = best_weights(projection.weight, f_NF, wanted, weights_N, 1e-2)
    before = {key: value.detach().clone() for key, value in mixer.named_parameters()}
    assert fit_output_projection(mixer, iter(given), 1e-2)
    torch.testing.assert_close(projection.weight, expected.float(), rtol=1e-4, atol=1e-5)
    moved = {key for key, value in mixer.named_parameters() if not torch.equal(value, before[key])}
    assert moved == {"o_proj.weight" if name != GATED_DELTA_NET else "out_proj.weight"}


@each_mixer
@torch.no_grad()
def test_errors_fall_where_it_learned_and_where_it_did_not(name: str):
    mixer, given = make(name), batches(lambda x, context, seed: make(SLIDING_ATTENTION)(x, context, None), 12)
    if name == SLIDING_ATTENTION:
        mixer.get_parameter("v_proj.weight").add_(0.1 * normal(16, HIDDEN))
    before = [relative_error(mixer(x, context, None), targets) for x, context, targets in given]
    fit_output_projection(mixer, given[2:], 1e-3)
    after = [relative_error(mixer(x, context, None), targets) for x, context, targets in given]
    assert sum(after[2:]) < 0.95 * sum(before[2:])
    assert sum(after[:2]) < 0.95 * sum(before[:2])


@each_mixer
def test_the_projection_is_found_by_its_name(name: str):
    mixer = make(name)
    expected = "out_proj" if name == GATED_DELTA_NET else "o_proj"
    assert output_projection(mixer) is mixer.get_submodule(expected)


class Strange(Mixer):
    """No output projection, or two."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__(tiny_config(), None)
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x_BTD: Tensor, context: SequenceContext, state: Any) -> Tensor:
        raise AssertionError("not to be called")

    def new_state(self, max_rollback: int) -> Any:
        raise AssertionError("not to be called")


def linear() -> nn.Linear:
    return nn.Linear(HIDDEN, HIDDEN)


@pytest.mark.parametrize(
    "mixer",
    [
        Strange(),
        Strange(w_out=linear()),
        Strange(o_proj=linear(), out_proj=linear()),
        Strange(o_proj=nn.Identity()),
    ],
)
def test_a_mixer_without_one_known_projection_is_left_alone(mixer: Mixer):
    assert output_projection(mixer) is None
    before = [parameter.detach().clone() for parameter in mixer.parameters()]
    assert not fit_output_projection(mixer, [], 1e-3)
    assert all(map(torch.equal, mixer.parameters(), before))


def test_nothing_stays_hooked_even_if_a_batch_fails():
    mixer = make(FULL_ATTENTION)

    def broken():
        yield from batches(random_targets, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_output_projection(mixer, broken(), 1e-3)
    fit_output_projection(mixer, batches(random_targets, 1), 1e-3)
    assert not projection_of(mixer)._forward_pre_hooks
