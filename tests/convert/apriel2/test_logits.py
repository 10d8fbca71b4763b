"""Whatever the format can say: the supernet computes what an independent reading of the format computes."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gearshift.convert import convert_teacher
from gearshift.supernet import SupernetForCausalLM, load_supernet
from tests.convert.apriel2.checkpoints import (
    ALL,
    ATTENTION,
    GDN,
    KDA,
    MLP,
    SUPERNET,
    UNGATED,
    VOCABULARY,
    WINDOW,
    Config,
    block,
    fixed,
    in_names,
    pattern,
    placements,
    random_tensor,
    random_tensors,
    save,
    stochastic,
)
from tests.convert.apriel2.reference import reference_logits

TOLERANCE = 1e-4
LENGTH = 10
ENABLED, DISABLED, UNSAID = ({"bias": {"enabled": value}} for value in (True, False, None))
QWEN_BIASES = {
    "query_layer": ENABLED,
    "key_layer": ENABLED,
    "value_layer": ENABLED,
    "dense_layer": DISABLED,
}
LLAMA3 = {
    "type": "llama3",
    "theta": 10000.0,
    "scale_factor": 8.0,
    "low_frequency_factor": 1.0,
    "high_frequency_factor": 4.0,
    "original_context_length": 32,
}
YARN = {
    "type": "yarn",
    "theta": 10000.0,
    "scale_factor": 4.0,
    "attention_factor": 1.2,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_context_length": 64,
}


def theta(value: float) -> Config:
    return {"rotary": {"type": "mistral_1d", "theta": value}}


def without(config: Config, *keys: str) -> Config:
    return {key: value for key, value in config.items() if key not in keys}


def silent(config: Config) -> Config:
    """A config that says nothing of biases, for tensors that have them."""
    if isinstance(config, dict):
        biases = ("add_linear_biases", *(key for key in config if key.endswith("_layer") or key == "layer_1"))
        kept = {"convolution_layer"}
        return {k: silent(v) for k, v in config.items() if k in kept or k not in biases}
    return [silent(entry) for entry in config] if isinstance(config, list) else config


def floats32_among_bfloat16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = ("A_log", "dt_bias")
    return {name: t if name.endswith(kept) else t.bfloat16() for name, t in tensors.items()}


def with_vision(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"adapter.linear_1.bias": (6,), "encoder.blocks.0.mixer.q_proj.weight": (6, 4)}
    more = {f"model.vision_encoder.{n}": random_tensor(n, s, generator) for n, s in shapes.items()}
    return tensors | more


def with_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {"lm_head.weight": torch.randn(VOCABULARY, 24)}


@dataclass(frozen=True)
class Variant:
    """A checkpoint: its config, what is changed of its tensors and, where it says less, what is written."""

    config: Config
    tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda tensors: tensors
    written: Callable[[Config], Config] = lambda config: config
    shards: int = 1


VARIANTS = {
    "a supernet": Variant(SUPERNET),
    "a pattern that repeats, with plain layers": Variant(
        pattern(
            {"s": block(stochastic(ALL, "kda")), "g": block(GDN), "w": block(WINDOW), "unused": {}},
            ["s", "g", "w", "g"],
            layers=6,
        )
    ),
    "a thinned supernet": Variant(
        pattern(
            {
                "layer_0": block(stochastic({"attention": ATTENTION, "kda": KDA}, "kda")),
                "layer_1": block(stochastic({"gdn": GDN}, "gdn")),
                "layer_2": block(stochastic({"sliding_window": WINDOW, "gdn": GDN}, "sliding_window")),
            },
            ["layer_0", "layer_1", "layer_2"],
        )
    ),
    "one plain mixer without positions in every layer": Variant(fixed(KDA)),
    "plain attention alone": Variant(fixed(ATTENTION)),
    "free names, and the first mixer as the main one": Variant(
        fixed(stochastic({"z": GDN, "a.b": WINDOW, "attention": KDA, "gdn": ATTENTION}))
    ),
    "other sizes in other layers": Variant(
        pattern(
            {
                "a": block(stochastic({"fa": ATTENTION, "swa": WINDOW, "gdn": GDN, "kda": KDA})),
                "b": block(
                    stochastic(
                        {
                            "fa": {**ATTENTION, "heads": 3, "head_groups": 3, "head_size": 4, **theta(50.0)},
                            "swa": {**WINDOW, "window_size": 3, "head_groups": 1},
                            "gdn": {**GDN, "value_heads": 3, "key_heads": 1, "value_head_dim": 4},
                            "kda": {
                                **KDA,
                                "heads": 2,
                                "head_dim": 8,
                                "convolution_layer": {"kernel_size": 2},
                            },
                        }
                    )
                ),
            },
            ["a", "b", "b"],
        )
    ),
    "gdn heads in groups of three": Variant(fixed({**GDN, "value_heads": 6, "key_heads": 2})),
    "gdn without an activation of its convolution": Variant(
        fixed({**GDN, "convolution_layer": {"kernel_size": 3, "activation": None}, "norm_eps": 0.05})
    ),
    "gdn with the activation spelled out": Variant(
        fixed({**GDN, "convolution_layer": {"kernel_size": 1, "activation": "silu"}})
    ),
    "kda with a sigmoid gate": Variant(
        fixed({**KDA, "normalization": {"epsilon": 0.05, "activation": "sigmoid"}})
    ),
    "kda whose convolution claims no activation": Variant(
        fixed({**KDA, "convolution_layer": {"kernel_size": 3, "activation": None}})
    ),
    "sizes left out": Variant(
        fixed(
            stochastic(
                {
                    "fa": without(ATTENTION, "head_groups"),
                    "gdn": {"type": "gdn", "convolution_layer": {"kernel_size": 4}},
                    "kda": {"type": "kda"},
                }
            ),
            without(MLP, "activation", "type"),
            head=None,
            embeddings=None,
            tie_word_embeddings=None,
            bos_token_id=None,
            eos_token_id=None,
        )
    ),
    "the vocabulary's size left out": Variant(
        fixed(stochastic(ALL), vocab_size=32000), written=lambda config: without(config, "vocab_size")
    ),
    "the hidden size left out": Variant(
        pattern({"a": block({**WINDOW, "head_groups": 1})}, ["a"], layers=1, hidden_size=4096),
        written=lambda config: without(config, "hidden_size"),
    ),
    "the decoder's type and all norms left out": Variant(
        {
            **SUPERNET,
            "decoder": {
                "num_blocks": 3,
                "block": without(block(stochastic(ALL)), "normalization"),
            },
            "head": {"normalization": {"epsilon": 0.02}},
        }
    ),
    "a large epsilon": Variant(
        pattern({"b": block(stochastic(ALL), epsilon=0.1)}, ["b"], head={"normalization": {"epsilon": 0.1}})
    ),
    "biases of Qwen2": Variant(
        fixed(
            stochastic(
                {"attention": {**ATTENTION, **QWEN_BIASES}, "swa": {**WINDOW, **QWEN_BIASES}, "gdn": GDN}
            ),
            tie_word_embeddings=True,
        )
    ),
    "biases everywhere, but for one": Variant(
        fixed(
            stochastic(
                {
                    "fa": {
                        **ATTENTION,
                        "add_linear_biases": True,
                        "key_layer": DISABLED,
                        "value_layer": None,
                    },
                    "swa": {
                        **WINDOW,
                        "add_linear_biases": False,
                        "dense_layer": ENABLED,
                        "key_layer": UNSAID,
                    },
                }
            )
        )
    ),
    "biases of which the config is silent": Variant(
        fixed(
            stochastic({"fa": {**ATTENTION, **QWEN_BIASES}, "swa": WINDOW}), {**UNGATED, "layer_1": ENABLED}
        ),
        written=silent,
    ),
    "an FFN without a gate": Variant(fixed(stochastic(ALL), UNGATED)),
    "an FFN without a gate, by default": Variant(fixed(ATTENTION, without(MLP, "gated"))),
    "an FFN without a gate, with biases": Variant(
        fixed(stochastic(ALL), {**UNGATED, "add_linear_biases": True, "activation": "gelu"})
    ),
    "an FFN without a gate, with one bias": Variant(
        fixed(GDN, {**UNGATED, "layer_2": ENABLED, "activation": "relu"})
    ),
    "an FFN with a gate that claims biases": Variant(
        fixed(KDA, {**MLP, "add_linear_biases": True, "layer_1": ENABLED, "activation": "gelu_pytorch_tanh"})
    ),
    "FFNs that differ": Variant(
        pattern(
            {
                "a": block(stochastic(ALL), {**MLP, "intermediate_size": 12}),
                "b": block(stochastic(ALL), {**UNGATED, "add_linear_biases": True, "activation": "gelu"}),
                "c": block(KDA, {**UNGATED, "layer_2": ENABLED}),
            },
            ["a", "b", "c"],
        )
    ),
    "other angles for the window": Variant(
        fixed(stochastic({"fa": {**ATTENTION, **theta(1e6)}, "swa": {**WINDOW, **theta(20.0)}}))
    ),
    "other heads for the window": Variant(
        fixed(stochastic({"swa": {**WINDOW, "heads": 2, "head_size": 6}, "fa": ATTENTION}, "swa"))
    ),
    "scaled angles as in Llama 3": Variant(
        fixed(stochastic({"fa": {**ATTENTION, "rotary": LLAMA3}, "swa": WINDOW}))
    ),
    "scaled angles as in YaRN": Variant(
        fixed(stochastic({"fa": {**ATTENTION, "rotary": YARN}, "swa": {**WINDOW, "rotary": LLAMA3}}))
    ),
    "a window of one token, and one longer than the text": Variant(
        pattern(
            {"a": block({**WINDOW, "window_size": 1}), "b": block({**WINDOW, "window_size": 99})}, ["a", "b"]
        )
    ),
    "tied embeddings": Variant({**SUPERNET, "tie_word_embeddings": True}),
    "tied embeddings and a head all the same": Variant(
        {**SUPERNET, "tie_word_embeddings": True}, tensors=with_head
    ),
    "a vision encoder": Variant(
        {**SUPERNET, "model_type": "apriel2", "vision_encoder": {"hidden_size": 6}, "image_token_index": 7},
        tensors=with_vision,
    ),
    "a vision encoder beside a text model": Variant(SUPERNET, tensors=with_vision),
    "bfloat16": Variant(SUPERNET, tensors=lambda given: {n: t.bfloat16() for n, t in given.items()}),
    "float16": Variant(SUPERNET, tensors=lambda given: {n: t.half() for n, t in given.items()}),
    "bfloat16 with some float32": Variant(SUPERNET, tensors=floats32_among_bfloat16),
    "layers that straddle shards": Variant(SUPERNET, shards=3),
    "unknown ways to sample": Variant(
        fixed(stochastic(ALL, "gdn", sampling_strategy="full_layout", sampling_weights={"x": []}))
    ),
}
TOKENS = torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(3))


def prepare(
    variant: Variant, directory: Path, seed: int = 0
) -> tuple[SupernetForCausalLM, dict[str, Tensor]]:
    """The converted supernet, and the checkpoint's tensors."""
    tensors = variant.tensors(random_tensors(variant.config, seed))
    save(directory / "in", variant.written(variant.config), tensors, variant.shards)
    return load_supernet(convert_teacher(directory / "in", directory / "out")), tensors


@torch.no_grad()
def check_logits(variant: Variant, directory: Path, seed: int = 0) -> None:
    supernet, tensors = prepare(variant, directory, seed)
    for placement in placements(variant.config):
        names = in_names(variant.config, placement)
        expected = reference_logits(variant.config, tensors, TOKENS.tolist(), names)
        assert expected.std() > 0.3  # a model that says nothing proves nothing
        given = supernet(TOKENS[None], placement=placement).logits[0]
        assert (given - expected).abs().max() < TOLERANCE, placement


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=list(VARIANTS))
def test_the_logits_of_every_placement(variant: Variant, tmp_path: Path):
    check_logits(variant, tmp_path)


def random_mixer(kind: str, rng: random.Random) -> Config:
    """A mixer of random sizes."""
    if kind == "gdn":
        heads = rng.choice([1, 2])
        sizes = {"key_head_dim": rng.choice([2, 5]), "value_head_dim": rng.choice([3, 4])}
        activation = {"activation": rng.choice(["silu", None])} if rng.random() < 0.5 else {}
        kernel = {"kernel_size": rng.randint(1, 5), **activation}
        grouped = {"value_heads": heads * rng.choice([1, 3]), "key_heads": heads}
        return {
            "type": "gdn",
            **grouped,
            **sizes,
            "convolution_layer": kernel,
            "norm_eps": rng.choice([1e-5, 0.01]),
        }
    if kind == "kda":
        norm = {"activation": rng.choice(["silu", "sigmoid"])} if rng.random() < 0.5 else {"epsilon": 0.01}
        sizes = {"heads": rng.randint(1, 3), "head_dim": rng.choice([3, 4])}
        return {
            "type": "kda",
            **sizes,
            "convolution_layer": {"kernel_size": rng.randint(1, 5)},
            "normalization": norm,
        }
    groups = rng.choice([1, 2])
    heads = {"heads": groups * rng.choice([1, 2]), "head_groups": groups, "head_size": rng.choice([2, 6])}
    biases = {layer: rng.choice([ENABLED, DISABLED, UNSAID]) for layer in QWEN_BIASES if rng.random() < 0.5}
    window = {"window_size": rng.randint(1, 12)} if kind == "swa" else {}
    plain = {"type": "attention", **theta(rng.choice([100.0, 1e6])), "add_linear_biases": rng.random() < 0.3}
    return {**plain, **heads, **biases, **window}


def random_config(rng: random.Random) -> Config:
    """A pattern of one to three blocks with random mixers and FFNs."""
    blocks = {}
    for name in "abc"[: rng.randint(1, 3)]:
        kinds = rng.sample(["fa", "swa", "gdn", "kda"], rng.randint(1, 4))
        mixers = {kind: random_mixer(kind, rng) for kind in kinds}
        mixer = mixers[kinds[0]] if len(kinds) == 1 else stochastic(mixers, rng.choice(kinds))
        mlp = {"type": "mlp", "intermediate_size": rng.choice([8, 12]), "gated": rng.random() < 0.5}
        blocks[name] = block(mixer, {**mlp, "add_linear_biases": rng.random() < 0.5})
    names = rng.choices(list(blocks), k=rng.randint(1, 4))
    return pattern(blocks, names, layers=3, tie_word_embeddings=rng.random() < 0.5)


@pytest.mark.parametrize("seed", range(6))
def test_random_checkpoints(seed: int, tmp_path: Path):
    check_logits(Variant(random_config(random.Random(seed))), tmp_path, seed)


@torch.no_grad()
def test_a_padded_text_gets_what_it_gets_alone(tmp_path: Path):
    """The format's own code lets padding into the states; its trainer and the supernet do not."""
    supernet, _ = prepare(VARIANTS["a supernet"], tmp_path)
    batch = torch.stack([TOKENS, TOKENS.roll(4)])
    batch[0, :4] = 0
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    for placement in (["kda", "gdn", "swa"], ["gdn", "fa", "kda"]):
        alone = supernet(TOKENS[None, 4:], placement=placement).logits[0]
        padded = supernet(batch, attention_mask=mask, placement=placement).logits[0, 4:]
        assert (padded - alone).abs().max() < TOLERANCE
