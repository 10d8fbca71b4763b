"""The first weights of the delta-rule mixers, property by property."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity, silu, softplus

from gearshift.convert.initialize import Aligned
from gearshift.convert.initialize.aligned import TIME_SCALES
from gearshift.placement import GATED_DELTA_NET, KIMI_DELTA_ATTENTION
from tests.convert.initialize.tools import (
    BIASES,
    DELTA_RULES,
    Sizes,
    attention_of,
    build,
    inputs,
    projections,
    read_out,
    run,
    start,
    taps,
)

ALIGNED = Aligned()
SMALL = Sizes()
all_sizes = st.builds(Sizes, st.integers(1, 4), st.integers(1, 4), st.sampled_from((2, 4, 8)))
each_rule = pytest.mark.parametrize("name", DELTA_RULES)
each_bias = pytest.mark.parametrize("biases", [(), BIASES, ("k_proj",)], ids=["none", "all", "keys"])


def time_scales(heads: int) -> torch.Tensor:
    fastest, slowest = TIME_SCALES
    return torch.logspace(math.log10(fastest), math.log10(slowest), heads)


@torch.no_grad()
@each_rule
@each_bias
@pytest.mark.parametrize("sizes", [Sizes(2, 2, 4), Sizes(1, 3, 8), Sizes(3, 1, 4)], ids=str)
def test_a_mixer_is_the_plain_read_out_with_explicit_biases(name: str, biases: tuple[str, ...], sizes: Sizes):
    attention = attention_of(sizes, biases)
    x = inputs(attention, 20)
    scales = [float(part.max()) for part in taps(start(ALIGNED, name, sizes, attention)).chunk(3)]
    pairs = [head // sizes.group for head in range(sizes.heads)]
    expected = read_out(attention, x[0], pairs, scales, time_scales(sizes.heads))
    out = run(build(ALIGNED, name, sizes, attention), x)[0]
    assert (out - expected).abs().max() < 1e-4 * expected.abs().max()
    if sizes.group > 1 and sizes.groups > 1:  # the comparison can tell pairings apart
        other = [head % sizes.groups for head in range(sizes.heads)]
        wrong = read_out(attention, x[0], other, scales, time_scales(sizes.heads))
        assert (out - wrong).abs().max() > 0.1 * expected.abs().max()


@each_rule
@given(sizes=all_sizes)
@examples(max_examples=25)
def test_a_query_head_reads_its_own_key_value_head(name: str, sizes: Sizes):
    attention = attention_of(sizes)
    made = projections(name, start(ALIGNED, name, sizes, attention), sizes.head_dim)
    for head in range(sizes.heads):
        own = head // sizes.group
        for part, source, index in (("q", "q_proj", head), ("k", "k_proj", own), ("v", "v_proj", own)):
            rows = getattr(attention, source)[index * sizes.head_dim : (index + 1) * sizes.head_dim]
            assert torch.equal(made[part][head], rows)


@each_rule
@given(sizes=all_sizes, data=st.data())
@examples(max_examples=25)
def test_a_key_value_head_reaches_only_its_query_heads(name: str, sizes: Sizes, data: st.DataObject):
    touched = data.draw(st.integers(0, sizes.groups - 1))
    attention = attention_of(sizes)
    before = projections(name, start(ALIGNED, name, sizes, attention), sizes.head_dim)
    rows = slice(touched * sizes.head_dim, (touched + 1) * sizes.head_dim)
    attention.k_proj[rows] += 1
    attention.v_proj[rows] += 1
    after = projections(name, start(ALIGNED, name, sizes, attention), sizes.head_dim)
    for part, moved in (("q", set()), ("k", {touched}), ("v", {touched})):
        changed = {
            head // sizes.group
            for head in range(sizes.heads)
            if not torch.equal(before[part][head], after[part][head])
        }
        assert changed == moved


@each_rule
@pytest.mark.parametrize("part", ["q", "k"])
def test_norms_of_heads_live_on_in_the_projections(name: str, part: str):
    """Behind the L2 norm a query or key points where the teacher's, normed and weighted, points."""
    attention = attention_of(SMALL, BIASES, qk_norm=True)
    tensors, x = start(ALIGNED, name, SMALL, attention), inputs(attention, 16)[0]
    source = f"{part}_proj"
    teachers = x @ getattr(attention, source).T + attention.biases[source]
    teachers = teachers.unflatten(-1, (-1, SMALL.head_dim))
    teachers = (
        teachers * teachers.square().mean(-1, keepdim=True).rsqrt() * getattr(attention, f"{part}_norm")
    )
    own = torch.arange(SMALL.heads) // (1 if part == "q" else SMALL.group)
    tap = taps(tensors).chunk(3)["qk".index(part)][:, 0, -1]
    biases = torch.cat([tensor for key, tensor in tensors.items() if "conv1d.bias" in key])
    bias = biases.chunk(3)["qk".index(part)]
    passed = torch.einsum("td,hkd->thk", x, projections(name, tensors, SMALL.head_dim)[part])
    passed = passed * tap.view(SMALL.heads, -1) + bias.view(SMALL.heads, -1)
    torch.testing.assert_close(
        cosine_similarity(passed, teachers[:, own], dim=-1), torch.ones(16, SMALL.heads), rtol=0, atol=1e-5
    )


@each_rule
def test_only_biases_that_can_be_folded_make_a_convolution_with_biases(name: str):
    for biases, expected in (((), None), (("o_proj",), None), (("q_proj", "o_proj"), True)):
        assert ALIGNED.mixer_fields(name, SMALL.fields(biases), 4).get("conv_bias") is expected


@each_rule
def test_the_outputs_bias_is_left_out(name: str):
    without, with_bias = (start(ALIGNED, name, SMALL, attention_of(SMALL, b)) for b in ((), ("o_proj",)))
    assert all(torch.equal(with_bias[key], tensor) for key, tensor in without.items())
    assert without.keys() == with_bias.keys()


@each_rule
def test_decay_starts_at_the_documented_time_scales(name: str):
    tensors = start(ALIGNED, name, SMALL, attention_of(SMALL))
    rates = softplus(tensors["dt_bias"]).view(4, -1) * tensors["A_log"].exp()[:, None]
    torch.testing.assert_close(1 / rates, time_scales(4)[:, None].expand_as(rates), rtol=1e-3, atol=0)
    assert TIME_SCALES[0] == pytest.approx(float(1 / rates[0, 0]), rel=1e-3)


@torch.no_grad()
def test_both_delta_rules_start_as_the_same_layer():
    attention = attention_of(Sizes(2, 3, 8), BIASES)
    gdn, kda = (build(ALIGNED, name, Sizes(2, 3, 8), attention) for name in DELTA_RULES)
    x = inputs(attention)
    torch.testing.assert_close(run(gdn, x), run(kda, x), rtol=1e-4, atol=1e-4)


@each_rule
def test_convolutions_pass_the_current_token_only(name: str):
    weight = taps(start(ALIGNED, name, SMALL, attention_of(SMALL)))
    assert weight.shape == (3 * 16, 1, 4)
    assert (weight[:, :, :-1] == 0).all()
    assert (weight[:, :, -1] > 0).all()
    for part in weight[:, 0, -1].chunk(3):  # one scale each for q, k and v keeps their angles
        assert (part == part[0]).all()


@torch.no_grad()
@each_rule
def test_a_layer_starts_with_something_to_say_in_every_head(name: str):
    attention = attention_of(SMALL)
    mixer, x = build(ALIGNED, name, SMALL, attention), inputs(attention)
    assert run(mixer, x).std() > 0.1
    projection = getattr(mixer, "out_proj" if name == GATED_DELTA_NET else "o_proj").weight
    kept = projection.clone()
    for head in range(4):
        projection.zero_()
        projection[:, head * 4 : head * 4 + 4] = kept[:, head * 4 : head * 4 + 4]
        assert run(mixer, x).std() > 0.05


@torch.no_grad()
@each_rule
@pytest.mark.parametrize("scaled", ["q_proj", "k_proj"])
@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_the_size_of_queries_and_keys_is_free(name: str, scaled: str, factor: float):
    attention = attention_of(SMALL, BIASES)
    x = inputs(attention)
    before = run(build(ALIGNED, name, SMALL, attention), x)
    getattr(attention, scaled).mul_(factor)
    attention.biases[scaled].mul_(factor)
    after = run(build(ALIGNED, name, SMALL, attention), x)
    assert (after - before).abs().max() < 1e-3 * before.abs().max()


@torch.no_grad()
@each_rule
@each_bias
def test_the_output_grows_with_the_teachers_values(name: str, biases: tuple[str, ...]):
    """The norm takes the values' size away; the output projection gives it back."""
    attention = attention_of(SMALL, biases)
    x = inputs(attention)
    before = run(build(ALIGNED, name, SMALL, attention), x)
    attention.v_proj.mul_(10)
    if "v_proj" in biases:
        attention.biases["v_proj"].mul_(10)
    after = run(build(ALIGNED, name, SMALL, attention), x)
    assert (after - 10 * before).abs().max() < 1e-3 * after.abs().max()


@torch.no_grad()
@each_rule
@each_bias
def test_the_output_is_about_as_large_as_the_values_it_reads(name: str, biases: tuple[str, ...]):
    """Reading values at random through the teacher's output projection, behind a half-open gate."""
    sizes = Sizes(2, 2, 8)
    attention = attention_of(sizes, biases)
    x = inputs(attention, 200)
    values = (x @ attention.v_proj.T + attention.biases.get("v_proj", 0)).unflatten(-1, (2, 8))
    expected = 0.5 * (values.repeat_interleave(2, dim=2).flatten(2) @ attention.o_proj.T).square().mean()
    expected = (
        0.5 * (values.repeat_interleave(2, dim=2).flatten(2) @ attention.o_proj.T).square().mean().sqrt()
    )
    ratio = float(run(build(ALIGNED, name, sizes, attention), x).square().mean().sqrt() / expected)
    assert 0.7 < ratio < 1.4


@each_rule
def test_silu_hardly_bends_what_the_convolutions_pass(name: str):
    """Behind SiLU the queries, keys and values point where the teacher's do."""
    sizes = Sizes(2, 2, 8)
    attention = attention_of(sizes)
    tensors, x = start(ALIGNED, name, sizes, attention), inputs(attention, 200)
    parts = projections(name, tensors, sizes.head_dim).values()
    for weight, tap in zip(parts, taps(tensors)[:, 0, -1].chunk(3), strict=True):
        wanted = torch.einsum("btd,hkd->bthk", x, weight)
        passed = silu(wanted * tap.view(4, 8))
        assert cosine_similarity(passed, wanted, dim=-1).mean() > 0.99
        assert (wanted * tap.view(4, 8)).square().mean().sqrt() > 0.1  # far above the L2 norm's epsilon


@each_rule
def test_gradients_reach_every_parameter(name: str):
    attention = attention_of(SMALL, BIASES)
    mixer, x = build(ALIGNED, name, SMALL, attention), inputs(attention)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    asleep = set()
    for _ in range(2):
        out = run(mixer, x)
        assert out.isfinite().all()
        mixer.zero_grad()
        (out - target).square().mean().backward()
        gradients = {key: p.grad for key, p in mixer.named_parameters() if p.grad is not None}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        moved = {key for key, gradient in gradients.items() if gradient.abs().sum() > 0}
        asleep = {key for key, _ in mixer.named_parameters()} - moved
        # Behind an outer projection of zero the inner one wakes with the second step.
        assert asleep <= {"f_a_proj.weight", "g_a_proj.weight"}
        with torch.no_grad():
            for key, parameter in mixer.named_parameters():
                parameter -= 0.01 * gradients[key]
    assert not asleep


def test_only_the_low_rank_gates_are_random():
    attention = attention_of(SMALL)
    for name in DELTA_RULES:
        first, second = (start(ALIGNED, name, SMALL, attention, seed) for seed in (0, 1))
        moved = {key for key in first if not torch.equal(first[key], second[key])}
        assert moved == ({"f_a_proj.weight", "g_a_proj.weight"} if name == KIMI_DELTA_ATTENTION else set())
