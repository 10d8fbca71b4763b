"""The contract suite for what a mixer may have beside its sizes: biases, norms, windows and the like."""

from __future__ import annotations

from typing import Any, ClassVar

from gearshift.placement import (
    FULL_ATTENTION,
    GATED_DELTA_NET,
    KIMI_DELTA_ATTENTION,
    SLIDING_ATTENTION,
)
from tests.supernet.mixer_contract import MixerContract
from tests.supernet.tools import ATTENTION_SIZES, MIXER_SIZES, WINDOW

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
OWN_ROPE: dict[str, Any] = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}


class TestFullAttentionWithAWindow(MixerContract):
    mixer = FULL_ATTENTION
    sizes: ClassVar = {**ATTENTION_SIZES, "window": WINDOW}


class TestFullAttentionWithEverything(MixerContract):
    """Biases, norms of the heads, heads of another size, and so a rotary embedding of its own."""

    mixer = FULL_ATTENTION
    sizes: ClassVar = {**ATTENTION_SIZES, "head_dim": 6, "biases": PROJECTIONS, "qk_norm": True}


class TestSlidingAttentionWithItsOwnRotaryEmbedding(MixerContract):
    mixer = SLIDING_ATTENTION
    sizes: ClassVar = {**MIXER_SIZES[SLIDING_ATTENTION], "biases": ["v_proj"], "rope_parameters": OWN_ROPE}


class TestGatedDeltaNetWithBiasesInItsConvolution(MixerContract):
    mixer = GATED_DELTA_NET
    sizes: ClassVar = {**MIXER_SIZES[GATED_DELTA_NET], "conv_bias": True, "conv_activation": "none"}


class TestKimiDeltaAttentionWithBiasesInItsConvolutions(MixerContract):
    mixer = KIMI_DELTA_ATTENTION
    sizes: ClassVar = {**MIXER_SIZES[KIMI_DELTA_ATTENTION], "conv_bias": True}
