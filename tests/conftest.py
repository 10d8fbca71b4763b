"""Settings that hold for every test, and a tiny teacher and supernet that any test may read."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: test processes share the cores, and more threads than cores slow all of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that asks a hub for something fails at once instead of waiting for a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import pytest
from hypothesis import settings

# The same examples in every run, and no time limit for an example: a busy machine must not fail a test.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")

TINY_LAYERS = 3


@pytest.fixture(scope="session")
def teacher_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers with a byte-level tokenizer. Read it, never write to it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny") / "teacher"
    config = LlamaConfig(
        vocab_size=_write_tokenizer(directory),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=TINY_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def _write_tokenizer(directory: Path) -> int:
    """A tokenizer with one token a byte, and an end-of-text token 0; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(directory)
    return len(vocabulary)


@pytest.fixture(scope="session")
def supernet_directory(teacher_directory: Path) -> Path:
    """The tiny teacher as a supernet with all four mixers. Read it, never write to it."""
    from gearshift.convert import convert_teacher

    return convert_teacher(teacher_directory, teacher_directory.with_name("supernet"), window=8)
