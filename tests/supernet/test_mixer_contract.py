"""The contract suite for the four mixers, and for a fifth that joins by what is written in this file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from gearshift import placement as placement_module
from gearshift.placement import (
    FULL_ATTENTION,
    GATED_DELTA_NET,
    KIMI_DELTA_ATTENTION,
    SLIDING_ATTENTION,
    Placement,
    PlacementError,
)
from gearshift.supernet import Mixer, MixerState, SequenceContext, SupernetConfig, register_mixer
from gearshift.supernet import config as config_module
from gearshift.supernet.cache import RecurrentState
from gearshift.supernet.mixers import MIXER_CLASSES
from tests.supernet.mixer_contract import MixerContract
from tests.supernet.tools import MIXER_SIZES, generate, random_tokens, tiny_config, tiny_supernet

AVERAGE, SHORT = "moving_average", "ema"


@dataclass(frozen=True)
class MovingAverageConfig:
    channels: int


class MovingAverage(Mixer):
    """s_t = a s_{t-1} + (1 - a) x_t on every channel, with a learned a."""

    config_class: ClassVar[type] = MovingAverageConfig

    def __init__(self, config: SupernetConfig, mixer_config: MovingAverageConfig) -> None:
        super().__init__(config, mixer_config)
        assert config.hidden_size is not None
        self.in_proj = nn.Linear(config.hidden_size, mixer_config.channels, bias=False)
        self.decay = nn.Parameter(torch.zeros(mixer_config.channels))
        self.out_proj = nn.Linear(mixer_config.channels, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, context: SequenceContext, state: MixerState | None) -> Tensor:
        assert state is None or isinstance(state, RecurrentState)
        rows = context.rows
        x = self.in_proj(x_BTD if rows is None else rows.gather(x_BTD))
        valid = torch.ones(x.shape[:2], dtype=torch.bool) if rows is None else rows.valid_NL
        average = x.new_zeros(x[:, 0].shape) if state is None or state.tensors is None else state.tensors[0]
        a, averages = self.decay.sigmoid(), []
        for t in range(x.shape[1]):
            average = torch.where(valid[:, t, None], a * average + (1 - a) * x[:, t], average)
            averages.append(average)
            if state is not None:
                state.advance((average,), 1)
        out = self.out_proj(torch.stack(averages, dim=1))
        return out if rows is None else rows.scatter(out, x_BTD)

    def new_state(self, max_rollback: int) -> RecurrentState:
        return RecurrentState(max_rollback)


@pytest.fixture(scope="class")
def moving_average() -> Iterator[None]:
    """Registered while a class of tests runs."""
    register_mixer(AVERAGE, SHORT)(MovingAverage)
    yield
    del MIXER_CLASSES[AVERAGE]
    del config_module._CONFIG_CLASSES[AVERAGE]
    del placement_module._short_names[AVERAGE]


class TestFullAttention(MixerContract):
    mixer = FULL_ATTENTION
    sizes = MIXER_SIZES[FULL_ATTENTION]


class TestSlidingAttention(MixerContract):
    mixer = SLIDING_ATTENTION
    sizes = MIXER_SIZES[SLIDING_ATTENTION]


class TestGatedDeltaNet(MixerContract):
    mixer = GATED_DELTA_NET
    sizes = MIXER_SIZES[GATED_DELTA_NET]


class TestKimiDeltaAttention(MixerContract):
    mixer = KIMI_DELTA_ATTENTION
    sizes = MIXER_SIZES[KIMI_DELTA_ATTENTION]


@pytest.mark.usefixtures("moving_average")
class TestMovingAverage(MixerContract):
    mixer = AVERAGE
    sizes: ClassVar = {"channels": 20}

    def test_beside_the_other_mixers(self) -> None:
        sizes = {**MIXER_SIZES, AVERAGE: self.sizes}
        model = tiny_supernet(8, tiny_config(list(sizes), sizes))
        tokens = random_tokens(95, 1, 12)
        logits = model(tokens, placement="ema kda swa moving_average").logits
        assert logits.isfinite().all()
        generated = generate(model, tokens, placement="ema gdn*2 fa", max_new_tokens=3)
        assert generated.shape == (1, 15)
        assert str(Placement.parse("moving_average*2 fa*2")) == "ema*2 fa*2"

    def test_its_entry_is_checked(self) -> None:
        with pytest.raises(config_module.ConfigError, match="did you mean 'channels'"):
            tiny_config([AVERAGE], {AVERAGE: {"channel": 3}})


def test_the_fifth_mixer_is_gone() -> None:
    with pytest.raises(PlacementError, match="unknown mixer 'ema'"):
        Placement.parse("ema")
