"""Small random Llama teachers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.convert.tiny_teachers import SIZES, Variant, save_teacher

MakeTeacher = Callable[..., Path]


@pytest.fixture
def make_teacher(tmp_path: Path) -> MakeTeacher:
    """Call it with fields of ``LlamaConfig``; returns the directory of a teacher with lively weights."""

    def make(dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", **fields: Any) -> Path:
        variant = Variant(dtype=dtype, max_shard_size=max_shard_size)
        return save_teacher(LlamaForCausalLM, LlamaConfig(**SIZES | fields), variant, tmp_path / "teacher")

    return make
