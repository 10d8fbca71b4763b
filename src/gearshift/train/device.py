"""Where training and evaluation run, and with what precision."""

from __future__ import annotations

import contextlib

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


def precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Weights stay in float32; on a GPU products run in bfloat16."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()
