"""Lively teachers with windows of their own, their text, and what a walk through them sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from gearshift.convert import convert_teacher
from gearshift.files import read_json_lines
from gearshift.supernet.checkpoint import read_config
from gearshift.supernet.mixers import Mixer
from gearshift.supernet.tensor_files import TensorFiles
from gearshift.train.calibrate import calibrate
from gearshift.train.calibrate.layers import read_mixer
from gearshift.train.calibrate.settings import CalibrationSettings
from gearshift.train.calibrate.walk import Observed, TeacherWalk
from gearshift.train.calibrate.windows import Windows
from tests.convert.teachers.test_qwen2 import MIXED
from tests.convert.tiny_teachers import SIZES, Variant, same_tensors, save_teacher

CPU = torch.device("cpu")
LENGTH = 24
LAYERS = 3


def lively_supernet(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A Qwen2 whose first and last layer have a window of 8, as a supernet; its teacher lies beside it."""
    config = Qwen2Config(**SIZES | MIXED)
    save_teacher(Qwen2ForCausalLM, config, Variant(dtype=dtype), folder / "teacher")
    return convert_teacher(folder / "teacher", folder / "supernet", window=4)


def random_windows(count: int = 24, judging: int = 3, seed: int = 0, length: int = LENGTH) -> Windows:
    tokens = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (count, length))
    return Windows(tokens, judging)


def walk_of(supernet: Path, windows: Windows) -> TeacherWalk:
    return TeacherWalk(read_config(supernet), TensorFiles(supernet), windows, CPU)


def observe_all(walk: TeacherWalk, folder: Path, layers: int = LAYERS) -> Iterator[Observed]:
    """Walk through the layers; every one keeps its files."""
    walk.embed(folder / "hidden-0")
    for layer in range(layers):
        given, after, targets = (folder / name for name in (f"hidden-{layer}", f"hidden-{layer + 1}", "t"))
        targets = targets.with_name(f"targets-{layer}")
        yield walk.observe(layer, given, after, targets)


def mixer_of(walk: TeacherWalk, layer: int, name: str) -> Mixer:
    return read_mixer(walk.config, walk.files, layer, name, CPU)


def tiny_settings(**changes: Any) -> CalibrationSettings:
    values: dict[str, Any] = {"tokens": 40 * LENGTH, "sequence_length": LENGTH, "steps": 8}
    return CalibrationSettings(**values | {"learning_rate": 3e-3, "seed": 3} | changes)


def relative_error(given_BTD: Tensor, wanted_BTD: Tensor) -> float:
    """Token by token, in float64."""
    given, wanted = given_BTD.detach().double().flatten(0, -2), wanted_BTD.double().flatten(0, -2)
    errors = [float((g - w).norm() / w.norm()) for g, w in zip(given, wanted, strict=True)]
    return sum(errors) / len(errors)


RUN_SETTINGS = tiny_settings(tokens=30 * LENGTH, steps=5)


def go(
    supernet: Path, texts: Path, out: Path, settings: CalibrationSettings = RUN_SETTINGS, **options: Any
) -> Path:
    return calibrate(supernet, texts, out, settings, **{"device": "cpu", "progress": False} | options)


def rows(out: Path) -> list[dict[str, Any]]:
    return read_json_lines(out / "calibration.jsonl")


def same_result(out: Path, reference: Path) -> bool:
    """Rows byte for byte, tensors bit for bit, and all other files."""
    names = [sorted(path.name for path in (root / "supernet").iterdir()) for root in (out, reference)]
    assert names[0] == names[1]
    others = [name for name in names[0] if not name.endswith(".safetensors")]
    return (
        (out / "calibration.jsonl").read_bytes() == (reference / "calibration.jsonl").read_bytes()
        and same_tensors(out / "supernet", reference / "supernet")
        and all(
            (out / "supernet" / n).read_bytes() == (reference / "supernet" / n).read_bytes() for n in others
        )
    )


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
