from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gearshift.placement import FULL_ATTENTION
from gearshift.supernet import SupernetForCausalLM, load_supernet, save_supernet
from gearshift.supernet.checkpoint import read_config
from gearshift.supernet.tensor_files import TensorFiles
from gearshift.train.calibrate.layers import (
    embed,
    plain_context,
    read_mixer,
    read_teacher_layer,
    trained_mixers,
)
from tests.supernet.tools import only_holding, random_tokens, tiny_config, tiny_supernet
from tests.train.calibrate.tools import CPU, LAYERS, lively_supernet

TRAINED = ("sliding_attention", "gated_delta_net", "kimi_delta_attention")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


class SpyingFiles(TensorFiles):
    """Remembers what was read."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.read_names: list[str] = []

    def read(self, name: str) -> Tensor:
        self.read_names.append(name)
        return super().read(name)


def own(model: SupernetForCausalLM, prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): p for n, p in model.named_parameters() if n.startswith(prefix)}


@each_dtype
def test_a_layer_s_teacher_is_what_the_whole_model_has_there(dtype: torch.dtype, tmp_path: Path):
    supernet = lively_supernet(tmp_path, dtype)
    model, files = load_supernet(supernet), SpyingFiles(supernet)
    for layer in range(LAYERS):
        files.read_names.clear()
        module = read_teacher_layer(read_config(supernet), files, layer, CPU)
        assert list(module.mixers) == [FULL_ATTENTION]
        expected = own(model, f"model.layers.{layer}.")
        for name, parameter in module.named_parameters():
            assert parameter.dtype == torch.float32
            assert not parameter.requires_grad
            assert torch.equal(parameter, expected[name]), name
        held = {name for name in expected if not name.startswith(tuple(f"mixers.{m}." for m in TRAINED))}
        assert {name for name, _ in module.named_parameters()} == held
        assert sorted(files.read_names) == sorted(f"model.layers.{layer}.{name}" for name in held)


@each_dtype
@pytest.mark.parametrize("name", TRAINED)
@torch.no_grad()
def test_a_mixer_is_that_of_its_layer(name: str, dtype: torch.dtype, tmp_path: Path):
    supernet = lively_supernet(tmp_path, dtype)
    model, files = load_supernet(supernet), SpyingFiles(supernet)
    mixer = read_mixer(read_config(supernet), files, 1, name, CPU)
    expected = own(model, f"model.layers.1.mixers.{name}.")
    assert {key for key, _ in mixer.named_parameters()} == set(expected)
    assert all(torch.equal(value, expected[key]) for key, value in mixer.named_parameters())
    assert all(value.dtype == torch.float32 for value in mixer.parameters())
    assert all(read.startswith(f"model.layers.1.mixers.{name}.") for read in files.read_names)


def test_the_teacher_s_own_mixer_is_not_trained(tmp_path: Path):
    held = [("full_attention", "gated_delta_net"), ("full_attention",), ("sliding_attention",)]
    model = only_holding(tiny_supernet(0, tiny_config(num_hidden_layers=3)), held)
    config = read_config(save_supernet(model, tmp_path / "thin"))
    trained = [trained_mixers(config, layer) for layer in range(3)]
    assert trained == [("gated_delta_net",), (), ("sliding_attention",)]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_positions_are_those_of_the_model(rope: dict):
    config = tiny_config(rope_parameters=rope)
    model = tiny_supernet(0, config)
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    model(random_tokens(0, 2, 40))
    context = plain_context(config, 40, CPU)
    assert all(map(torch.equal, context.cos_sin, seen[0].cos_sin))
    assert context.positions_BT is not None
    assert torch.equal(context.positions_BT, seen[0].positions_BT)
    assert (context.past, context.rows, context.padding_mask_BS) == (0, None, None)


@each_dtype
def test_embeddings_are_as_they_are_stored(dtype: torch.dtype, tmp_path: Path):
    supernet = lively_supernet(tmp_path, dtype)
    batches = [random_tokens(seed, 2, 7) for seed in range(3)]
    files = SpyingFiles(supernet)
    hidden = list(embed(files, batches))
    expected = load_supernet(supernet).model.embed_tokens
    for batch, given in zip(batches, hidden, strict=True):
        assert given.dtype == dtype
        assert torch.equal(given.float(), expected(batch))
    assert files.read_names == ["model.embed_tokens.weight"]
