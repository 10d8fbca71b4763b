"""What an initialiser is, and what all of them agree on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from gearshift.convert.initialize.attention import TeacherAttention
from gearshift.convert.teachers.base import ConversionError
from gearshift.placement import FULL_ATTENTION, GATED_DELTA_NET, KIMI_DELTA_ATTENTION, SLIDING_ATTENTION
from gearshift.supernet.config import SupernetConfig

# Copies of the teacher's attention, whatever the initialiser.
COPIED_MIXERS = (FULL_ATTENTION, SLIDING_ATTENTION)
INITIALIZED_MIXERS = (GATED_DELTA_NET, KIMI_DELTA_ATTENTION)
# Where a bias can be folded into the short convolutions.
FOLDED_BIASES = ("q_proj", "k_proj", "v_proj")


class Initializer(Protocol):
    """A recipe for the first weights of a layer's mixers."""

    @property
    def name(self) -> str:
        """As in ``gearshift convert --init``."""
        ...

    def mixer_fields(self, mixer: str, attention_fields: Mapping[str, Any], window: int) -> dict[str, Any]:
        """The fields of a mixer's configuration.

        Args:
            mixer: its long name, of `COPIED_MIXERS` or `INITIALIZED_MIXERS`.
            attention_fields: of the teacher's attention, as ``Teacher.attention_fields`` has them.
            window: tokens that sliding attention sees.

        Raises:
            ConversionError: this mixer cannot be made from attention.
        """
        ...

    def tensors(
        self,
        mixer: str,
        config: SupernetConfig,
        layer: int,
        attention: TeacherAttention,
        generator: torch.Generator,
    ) -> dict[str, Tensor]:
        """The float32 tensors of one mixer of `INITIALIZED_MIXERS` in one layer, by their names inside it.

        Args:
            mixer: its long name.
            config: the supernet's.
            layer: counted from zero.
            attention: the teacher's attention of that layer.
            generator: of what is random; see :func:`seeded_generator`.
        """
        ...


def seeded_generator(seed: int, layer: int, mixer: str) -> torch.Generator:
    """Random numbers of one mixer in one layer, the same in whatever order layers and mixers are made."""
    digest = hashlib.sha256(f"{seed} {layer} {mixer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))


def copied_fields(mixer: str, attention_fields: Mapping[str, Any], window: int) -> dict[str, Any]:
    """The fields of a mixer that is a copy of the teacher's attention; what is absent in it stays out.

    Raises:
        ConversionError: it is none.
    """
    if mixer not in COPIED_MIXERS:
        raise ConversionError(
            f"there is no initialiser for {mixer}; "
            f"convert knows {', '.join((*COPIED_MIXERS, *INITIALIZED_MIXERS))}"
        )
    fields = {key: value for key, value in attention_fields.items() if value}
    return fields if mixer == FULL_ATTENTION else {**fields, "window": window}
