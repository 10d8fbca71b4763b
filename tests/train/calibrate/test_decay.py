from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gearshift.placement import GATED_DELTA_NET, KIMI_DELTA_ATTENTION, SLIDING_ATTENTION
from gearshift.supernet.mixers import MIXER_CLASSES, Mixer
from gearshift.supernet.mixers.recurrent import RecurrentMixer
from gearshift.train.calibrate.decay import set_time_scales
from tests.supernet.tools import randomize, tiny_config

HEADS = {GATED_DELTA_NET: 4, KIMI_DELTA_ATTENTION: 3}
each_rule = pytest.mark.parametrize("name", HEADS)


def make(name: str) -> Mixer:
    torch.manual_seed(0)
    config = tiny_config()
    mixer = MIXER_CLASSES[name](config, config.mixer_config(name))
    randomize(mixer)
    return mixer


def weights(mixer: Mixer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in mixer.named_parameters()}


def changed(mixer: Mixer, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in weights(mixer).items() if not torch.equal(value, before[name])}


@each_rule
@given(data=st.data())
def test_a_memory_fades_to_1_over_e_within_its_time_scale(name: str, data: st.DataObject):
    mixer, heads = make(name), HEADS[name]
    assert isinstance(mixer, RecurrentMixer)
    scales = torch.tensor(data.draw(st.lists(st.floats(1, 1e5), min_size=heads, max_size=heads)))
    rates = torch.tensor(data.draw(st.lists(st.floats(-3, 3), min_size=heads, max_size=heads)))
    mixer.get_parameter("A_log").data.copy_(rates)
    assert set_time_scales(mixer, scales)
    # Inputs of zero say nothing: what is left is exp(-exp(A_log) softplus(dt_bias)).
    log_decay, _ = mixer.decay_and_strength(torch.zeros(1, 1, 32))
    wanted = (-1 / scales).view(heads, *(1,) * (log_decay.dim() - 3)).expand(log_decay.shape[2:])
    torch.testing.assert_close(log_decay[0, 0], wanted, rtol=1e-4, atol=0)


@each_rule
def test_every_channel_of_a_head_gets_its_head_s_number_and_nothing_else_moves(name: str):
    mixer, heads = make(name), HEADS[name]
    before = weights(mixer)
    scales = torch.logspace(0, 3, heads, dtype=torch.float64)
    assert set_time_scales(mixer, scales)
    assert changed(mixer, before) == {"dt_bias"}
    a_log, bias = (weights(mixer)[key].double() for key in ("A_log", "dt_bias"))
    for head, row in enumerate(bias.view(heads, -1)):
        decay = torch.exp(-a_log[head].exp() * torch.nn.functional.softplus(row))
        torch.testing.assert_close(decay, torch.exp(-1 / scales[head]).expand_as(row), rtol=1e-5, atol=0)


@each_rule
@pytest.mark.parametrize("more", [-1, 1, 4])
def test_other_heads_are_left_alone(name: str, more: int):
    mixer = make(name)
    before = weights(mixer)
    assert not set_time_scales(mixer, torch.full((HEADS[name] + more,), 10.0))
    assert changed(mixer, before) == set()


def test_a_mixer_that_does_not_decay_is_left_alone():
    mixer = make(SLIDING_ATTENTION)
    before = weights(mixer)
    assert not set_time_scales(mixer, torch.full((4,), 10.0))
    assert changed(mixer, before) == set()
