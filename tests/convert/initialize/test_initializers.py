"""What every initialiser keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from gearshift.convert import ConversionError
from gearshift.convert.initialize import (
    DEFAULT_INITIALIZER,
    INITIALIZERS,
    TeacherAttention,
    seeded_generator,
)
from gearshift.placement import FULL_ATTENTION, GATED_DELTA_NET, KIMI_DELTA_ATTENTION, SLIDING_ATTENTION
from tests.convert.initialize.tools import BIASES, DELTA_RULES, Sizes, attention_of, build, inputs, run

each_recipe = pytest.mark.parametrize("recipe", INITIALIZERS)


def test_names():
    assert all(initializer.name == name for name, initializer in INITIALIZERS.items())
    assert DEFAULT_INITIALIZER in INITIALIZERS


@torch.no_grad()
@each_recipe
@given(
    sizes=st.builds(Sizes, st.integers(1, 3), st.integers(1, 3), st.sampled_from((1, 2, 6))),
    biases=st.sets(st.sampled_from((*BIASES, "o_proj"))).map(lambda names: tuple(sorted(names))),
    qk_norm=st.booleans(),
)
@examples(max_examples=15)
def test_tensors_fit_the_mixer_and_are_finite(
    recipe: str, sizes: Sizes, biases: tuple[str, ...], qk_norm: bool
):
    attention = attention_of(sizes, biases, qk_norm)
    for name in DELTA_RULES:
        out = run(build(INITIALIZERS[recipe], name, sizes, attention), inputs(attention, 9))
        assert out.isfinite().all()


@torch.no_grad()
@each_recipe
@pytest.mark.parametrize("name", DELTA_RULES)
def test_a_teacher_of_zeros_gives_finite_outputs(recipe: str, name: str):
    attention = attention_of(Sizes())
    x = inputs(attention, 9)
    for weight in (attention.q_proj, attention.k_proj, attention.v_proj):
        weight.zero_()
    assert run(build(INITIALIZERS[recipe], name, Sizes(), attention), x).isfinite().all()


@each_recipe
def test_attention_keeps_what_the_teacher_has(recipe: str):
    fields = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "biases": ["q_proj"], "qk_norm": False}
    expected = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "biases": ["q_proj"]}
    initializer = INITIALIZERS[recipe]
    assert initializer.mixer_fields(FULL_ATTENTION, fields, 7) == expected
    assert initializer.mixer_fields(SLIDING_ATTENTION, fields, 7) == {**expected, "window": 7}


@each_recipe
def test_a_mixer_without_recipe_is_refused(recipe: str):
    with pytest.raises(ConversionError, match="no initialiser for mamba; convert knows full_attention, "):
        INITIALIZERS[recipe].mixer_fields("mamba", Sizes().fields(), 4)


def test_random_numbers_depend_on_seed_layer_and_mixer_alone():
    def drawn(seed: int, layer: int, mixer: str) -> tuple[float, ...]:
        return tuple(torch.rand(3, generator=seeded_generator(seed, layer, mixer)).tolist())

    keys = [
        (seed, layer, mixer)
        for seed in (0, 1, 11)
        for layer in (0, 1, 10, 47)
        for mixer in (GATED_DELTA_NET, KIMI_DELTA_ATTENTION)
    ]
    first = {key: drawn(*key) for key in keys}
    assert len(set(first.values())) == len(keys)
    assert {key: drawn(*key) for key in reversed(keys)} == first


def test_a_layer_is_read_by_the_names_of_its_tensors():
    names = {"q_proj": (4, 6), "k_proj": (2, 6), "v_proj": (2, 6), "o_proj": (6, 4)}
    tensors = {f"{name}.weight": torch.rand(shape).bfloat16() for name, shape in names.items()}
    tensors |= {"k_proj.bias": torch.rand(2).half(), "q_norm.weight": torch.rand(2)}
    attention = TeacherAttention.from_tensors(tensors, torch.rand(6).bfloat16(), head_dim=2)
    assert (attention.num_heads, attention.num_key_value_heads) == (2, 1)
    assert torch.equal(attention.o_proj, tensors["o_proj.weight"].float())
    assert attention.norm.dtype == torch.float32
    assert set(attention.biases) == {"k_proj"} and attention.biases["k_proj"].dtype == torch.float32
    assert attention.q_norm is not None and attention.k_norm is None
