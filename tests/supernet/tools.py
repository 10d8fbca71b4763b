"""What the tests of the model share: small random supernets, and how far two tensors are apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gearshift.placement import MIXERS
from gearshift.supernet import SupernetConfig, SupernetForCausalLM

LAYERS = 4
VOCABULARY = 61
WINDOW = 5
UNIFORM = ("fa*4", "swa*4", "gdn*4", "kda*4")
MIXED = ("fa swa gdn kda", "kda gdn swa fa")
PLACEMENTS = UNIFORM + MIXED
TOLERANCE = 1e-4

ATTENTION_SIZES = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
# GDN with two value heads on a key head, KDA with a gate rank of its own: no two sizes are equal by chance.
MIXER_SIZES: dict[str, dict[str, Any]] = {
    "full_attention": ATTENTION_SIZES,
    "sliding_attention": {**ATTENTION_SIZES, "window": WINDOW},
    "gated_delta_net": {"num_heads": 4, "num_key_heads": 2, "key_head_dim": 6, "value_head_dim": 10},
    "kimi_delta_attention": {"num_heads": 3, "head_dim": 10, "gate_rank": 7},
}


def tiny_config(
    mixers: Sequence[str] = MIXERS, sizes: dict[str, dict[str, Any]] = MIXER_SIZES, **changes: Any
) -> SupernetConfig:
    """A config of 4 layers and width 32."""
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "head_dim": 8,
        "mixers": {name: sizes[name] for name in mixers},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 256,
    }
    return SupernetConfig(**{**fields, **changes})


def tiny_supernet(seed: int, config: SupernetConfig | None = None) -> SupernetForCausalLM:
    """A random supernet whose every weight is large enough to matter to the logits."""
    torch.manual_seed(seed)
    model = SupernetForCausalLM(config or tiny_config()).eval()
    randomize(model)
    return model


@torch.no_grad()
def randomize(module: torch.nn.Module) -> None:
    """Matrices of unit gain, norms and biases away from their usual ones and zeros."""
    for name, parameter in module.named_parameters():
        if "embed_tokens" in name:
            parameter.normal_()
        elif parameter.dim() >= 2:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.add_(0.3 * torch.randn_like(parameter))


def only_holding(model: SupernetForCausalLM, held: Sequence[Sequence[str]]) -> SupernetForCausalLM:
    """A supernet whose layers hold no other mixers than these, with the weights that ``model`` has there."""
    fields = model.config.to_dict()
    fields.pop("placement")
    fields["mixers"] = {name: fields["mixers"][name] for name in {name for names in held for name in names}}
    fields["layer_mixers"] = [{name: {} for name in names} for names in held]
    thin = SupernetForCausalLM(SupernetConfig.from_dict(fields)).eval()
    weights = model.state_dict()
    thin.load_state_dict({name: weights[name] for name in thin.state_dict()})
    return thin


def random_tokens(seed: int, *shape: int) -> Tensor:
    """Token ids of the tiny supernet's vocabulary."""
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def padded_batch(
    seed: int, lengths: Sequence[int], before: Sequence[int], width: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Sequences, a batch with ``before`` random tokens ahead of each and others behind it, and its mask."""
    sequences = [random_tokens(seed + length, length) for length in lengths]
    batch = random_tokens(seed, len(lengths), width)
    mask = torch.zeros_like(batch)
    for row, (start, sequence) in enumerate(zip(before, sequences, strict=True)):
        batch[row, start : start + len(sequence)] = sequence
        mask[row, start : start + len(sequence)] = 1
    return sequences, batch, mask


def relative_error(given: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest expected number."""
    assert given.shape == expected.shape
    expected = expected.detach()
    scale = expected.abs().max().double().clamp(min=1e-20)
    return float((given.detach().double() - expected.double()).abs().max() / scale)


def assert_close(given: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Same shape, finite, and no number further apart than the tolerance."""
    assert given.shape == expected.shape, f"{tuple(given.shape)} is not {tuple(expected.shape)}"
    assert given.isfinite().all()
    error = float((given - expected).abs().max())
    assert error < tolerance, f"largest difference {error:.2e}"


def feed(
    model: SupernetForCausalLM, cache: Any, tokens: Tensor, pieces: Sequence[int], **inputs: Any
) -> Tensor:
    """Logits of all tokens, given to a cache piece by piece."""
    assert sum(pieces) == tokens.shape[1]
    parts = tokens.split(list(pieces), dim=1)
    placement = cache.placement
    logits = [model(part, past_key_values=cache, placement=placement, **inputs).logits for part in parts]
    return torch.cat(logits, dim=1)


def generate(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Transformers' ``generate``; its own annotations refuse every model, its own Llama too."""
    return model.generate(tokens, do_sample=False, **options)


@contextmanager
def poisoned(model: SupernetForCausalLM, placement: Sequence[str]) -> Iterator[list[torch.nn.Parameter]]:
    """NaN in the weights of every mixer that the placement leaves out; yields those weights."""
    unused = [
        parameter
        for layer, used in zip(model.model.layers, placement, strict=True)
        for name, mixer in layer.mixers.items()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        if name != used
        for parameter in mixer.parameters()
    ]
    saved = [parameter.detach().clone() for parameter in unused]
    with torch.no_grad():
        for parameter in unused:
            parameter.fill_(float("nan"))
    try:
        yield unused
    finally:
        with torch.no_grad():
            for parameter, value in zip(unused, saved, strict=True):
                parameter.copy_(value)
