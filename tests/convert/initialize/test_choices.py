"""What an ablation takes out of `aligned` is what it says, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import softplus

from gearshift.convert.initialize import Aligned
from tests.convert.initialize.tools import BIASES, DELTA_RULES, Sizes, attention_of, build, inputs, run, start

SIZES = Sizes(3, 2, 4)
CHANGED = {
    "pairing": ("modulo", {"in_proj_qkvz.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight"}),
    "decay": ("uniform", {"dt_bias"}),
    "convolution": ("random", {"conv1d.weight", "conv1d.bias"}),
    "gate": ("closed", set()),
}
each_rule = pytest.mark.parametrize("name", DELTA_RULES)


@each_rule
@pytest.mark.parametrize("choice", CHANGED)
def test_a_choice_changes_its_tensors_only(name: str, choice: str):
    value, expected = CHANGED[choice]
    attention = attention_of(SIZES, BIASES)
    before = start(Aligned(), name, SIZES, attention)
    after = start(dataclasses.replace(Aligned(), **{choice: value}), name, SIZES, attention)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    changed = {key[2:] if "conv1d" in key and key[1] == "_" else key for key in changed}
    # Heads' output sizes move with their values; the gate is a field of the config; random numbers drawn
    # for the convolution come before those of the low-rank gates.
    allowed = expected | ({"o_proj.weight", "conv1d.weight", "conv1d.bias"} if choice == "pairing" else set())
    allowed |= {"f_a_proj.weight", "g_a_proj.weight"} if choice == "convolution" else set()
    assert changed <= allowed
    assert bool(changed) == bool(expected)


@torch.no_grad()
@each_rule
def test_a_closed_gate_adds_nothing(name: str):
    attention = attention_of(SIZES)
    assert (run(build(Aligned(gate="closed"), name, SIZES, attention), inputs(attention)) == 0).all()


@each_rule
def test_a_uniform_decay_is_the_mean_of_the_spread(name: str):
    def logarithms(initializer: Aligned) -> torch.Tensor:
        return softplus(start(initializer, name, SIZES, attention_of(SIZES))["dt_bias"]).log()

    spread, uniform = logarithms(Aligned()), logarithms(Aligned(decay="uniform"))
    assert spread.std() > 0.5
    torch.testing.assert_close(uniform, spread.mean().expand_as(uniform), rtol=0, atol=1e-3)


@torch.no_grad()
@each_rule
def test_dropped_biases_are_as_if_never_there(name: str):
    initializer = Aligned(biases="dropped")
    bare, biased = (attention_of(SIZES, biases) for biases in ((), BIASES))
    assert "conv_bias" not in initializer.mixer_fields(name, SIZES.fields(BIASES), 4)
    x = inputs(bare)
    kept = run(build(initializer, name, SIZES, biased), x)
    assert torch.equal(kept, run(build(Aligned(), name, SIZES, bare), x))
    assert not torch.allclose(kept, run(build(Aligned(), name, SIZES, biased), x), atol=0.1)


@torch.no_grad()
@each_rule
def test_random_convolutions_shift_by_the_whole_bias(name: str):
    """Of inputs that never change, the convolution of the biased projection is what it always was."""
    initializer, attention = Aligned(convolution="random"), attention_of(SIZES, BIASES)
    tensors = start(initializer, name, SIZES, attention)
    weights = torch.cat([t for key, t in tensors.items() if "conv1d.weight" in key]).squeeze(1)
    offsets = torch.cat([t for key, t in tensors.items() if "conv1d.bias" in key])
    own = torch.arange(SIZES.heads) // SIZES.group
    q = attention.biases["q_proj"]
    k, v = (attention.biases[part].unflatten(0, (-1, SIZES.head_dim))[own].flatten() for part in BIASES[1:])
    constant = torch.cat([q, k, v])[None, :, None].expand(1, -1, weights.shape[1])
    expected = torch.nn.functional.conv1d(constant, weights[:, None], groups=len(weights)).flatten()
    torch.testing.assert_close(offsets, expected, rtol=1e-4, atol=1e-4)
