"""With every layer on full attention, the shipped teacher's supernet is the teacher."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from gearshift.convert import convert_teacher
from gearshift.supernet import SupernetForCausalLM, load_supernet
from tests.supernet.tools import generate

TEACHER = Path(__file__).parents[2] / "teachers" / "python-11m"
TEXTS = (
    "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n",
    "import os\n\n\nclass Walker:\n    def __init__(self, root):\n        self.root = root\n",
)


@pytest.fixture(scope="module")
def teacher() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def supernet(tmp_path_factory: pytest.TempPathFactory) -> SupernetForCausalLM:
    directory = convert_teacher(TEACHER, tmp_path_factory.mktemp("shipped") / "supernet")
    return load_supernet(directory, dtype=torch.float32).eval()


@pytest.mark.parametrize("text", TEXTS)
@torch.no_grad()
def test_logits_of_code(teacher: LlamaForCausalLM, supernet: SupernetForCausalLM, text: str) -> None:
    tokens = AutoTokenizer.from_pretrained(TEACHER)(text, return_tensors="pt").input_ids
    expected = teacher(tokens).logits
    given = supernet(tokens, placement="fa*12").logits
    assert (given - expected).abs().max() < 1e-4
    assert torch.equal(given.argmax(-1), expected.argmax(-1))


@torch.no_grad()
def test_logits_of_a_long_padded_batch(teacher: LlamaForCausalLM, supernet: SupernetForCausalLM) -> None:
    tokens = torch.randint(6144, (2, 300), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[0, :77] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = teacher(tokens, attention_mask=mask, position_ids=positions).logits
    given = supernet(tokens, attention_mask=mask, placement="fa*12").logits
    keep = mask.bool()
    assert (given - expected)[keep].abs().max() < 1e-4
    assert torch.equal(given.argmax(-1)[keep], expected.argmax(-1)[keep])


@torch.no_grad()
def test_generated_tokens(teacher: LlamaForCausalLM, supernet: SupernetForCausalLM) -> None:
    tokens = AutoTokenizer.from_pretrained(TEACHER)(TEXTS[0], return_tensors="pt").input_ids
    given = generate(supernet, tokens, placement="fa*12", max_new_tokens=12)
    assert torch.equal(given, generate(teacher, tokens, max_new_tokens=12))
