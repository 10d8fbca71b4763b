"""A checkpoint that ServiceNow's code wrote, and the logits it gave for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gearshift.convert import convert_teacher
from gearshift.supernet import SupernetForCausalLM, load_supernet
from tests.convert.apriel2.reference import reference_logits
from tests.convert.tiny_teachers import all_tensors

FIXTURE = Path(__file__).with_name("fixture")
SHORT = {"attention": "fa", "sliding_window": "swa", "gdn": "gdn", "kda": "kda"}
PLACEMENTS = json.loads((FIXTURE / "placements.json").read_text())["placements"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_teacher(FIXTURE, tmp_path_factory.mktemp("fixture") / "out")


@pytest.fixture(scope="module")
def supernet(converted: Path) -> SupernetForCausalLM:
    return load_supernet(converted)


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(FIXTURE / "expected.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda placement: placement["name"])
def test_every_placement_gives_the_logits_that_it_gave_there(
    placement: dict, supernet: SupernetForCausalLM, expected: dict[str, Tensor]
):
    given = supernet(expected["input_ids"], placement=[SHORT[name] for name in placement["mixers"]]).logits
    assert (given - expected[placement["logits"]]).abs().max() < 1e-4


def test_our_own_reference_agrees_with_it(expected: dict[str, Tensor]):
    config = json.loads((FIXTURE / "config.json").read_text())
    placement, tokens = PLACEMENTS[4], expected["input_ids"][0].tolist()
    given = reference_logits(config, load_file(FIXTURE / "model.safetensors"), tokens, placement["mixers"])
    assert (given - expected[placement["logits"]][0]).abs().max() < 2e-5


def test_every_tensor_is_there_bit_for_bit(converted: Path):
    given = sorted(tensor.numpy().tobytes() for tensor in all_tensors(converted).values())
    stored = load_file(FIXTURE / "model.safetensors")
    assert given == sorted(tensor.numpy().tobytes() for tensor in stored.values())


def test_what_its_config_says(supernet: SupernetForCausalLM):
    config = supernet.config
    assert config.placement == "fa*4"
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 3)
    assert config.max_position_embeddings == 512
    assert config.layer_mixers is None
    assert config.mixer_config("kda").gate_activation == "silu"
