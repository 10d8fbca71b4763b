"""Where training and evaluation run, and with what precision."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Literal

import torch

from gearshift.errors import GearshiftError


class DeviceError(GearshiftError):
    """The device that was asked for is not there."""


def choose_device(wanted: str) -> torch.device:
    """The device that ``auto``, ``cpu`` or ``cuda`` means here; ``auto`` takes a GPU if there is one.

    Raises:
        DeviceError: a GPU is asked for and there is none.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device is 'cuda', but torch finds no GPU here; use 'auto' or 'cpu'")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Precision:
    """How products are computed; trained weights and their moments are float32 in any case.

    Attributes:
        device: where.
        half: in bfloat16.
    """

    device: torch.device
    half: bool

    @classmethod
    def of(cls, device: torch.device, wanted: Literal["auto", "fp32", "bf16"] = "auto") -> Precision:
        """What a recipe asks for; ``auto`` is bfloat16 on a GPU and float32 on a CPU."""
        return cls(device, device.type == "cuda" if wanted == "auto" else wanted == "bf16")

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Within it products have this precision."""
        if self.half:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()


def precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Weights stay in float32; on a GPU products run in bfloat16."""
    return Precision.of(device).autocast()
