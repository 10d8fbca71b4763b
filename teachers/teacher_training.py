"""The teacher's model, optimiser, schedule and saved state."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from teacher_corpus import END, PAD
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gearshift.files import atomic_directory, read_json_lines
from gearshift.train.data import PackedTokens

STATE = "state"


@dataclass(frozen=True)
class Shape:
    """The size of the model and of a training batch."""

    vocabulary: int = 6144
    hidden: int = 256
    intermediate: int = 576
    layers: int = 12
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    context: int = 2048
    batch_rows: int = 128


@dataclass(frozen=True)
class Schedule:
    """Warm-up, constant rate, linear decay; the decay follows the clock so that it ends with the time."""

    peak: float = 3e-3
    floor: float = 1e-5
    warmup_steps: int = 150
    decay_share: float = 0.28

    def rate(self, progress: Progress, total_seconds: float | None) -> float:
        """The learning rate of the next step; without a total of training seconds there is no decay yet."""
        warm = min(1.0, (progress.step - progress.warm_up_from + 1) / self.warmup_steps)
        if total_seconds is None:
            return self.peak * warm
        left = max(0.0, 1.0 - progress.seconds / total_seconds) / self.decay_share
        return max(self.floor, self.peak * min(warm, left))


@dataclass
class Progress:
    """How far the training has come; saved with the weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    calls: int = 0
    skipped_steps: int = 0
    warm_up_from: int = 0


def build_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A freshly initialised teacher in float32; residual outputs start smaller, as in GPT-2."""
    torch.manual_seed(seed)
    tokens = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokens[END],
        eos_token_id=tokens[END],
        pad_token_id=tokens[PAD],
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.div_((2 * shape.layers) ** 0.5)
    return model


def logits_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Logits (batch, time, vocabulary) of whole rows, causal, without a mask.

    The layers are called here and not through the model, whose mask code hides from the compiler that
    plain causal attention is meant, which would cost the fast attention kernel.
    """
    inner = model.model
    hidden = inner.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rotary = inner.rotary_emb(hidden, position_ids=positions)
    for layer in inner.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return model.lm_head(inner.norm(hidden))


def next_token_loss(model: LlamaForCausalLM, rows: Tensor) -> Tensor:
    """Mean cross-entropy (nats a token) of rows (batch, time + 1)."""
    logits = logits_of(model, rows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def build_optimizer(model: LlamaForCausalLM, peak: float, fused: bool) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), eps=1e-8, fused=fused)


class Batches:
    """Rows of a step: three quarters code, one quarter recall tasks; a pure function of seed and step."""

    def __init__(self, code: PackedTokens, recall: npt.NDArray[np.uint16], rows: int, seed: int) -> None:
        self.code = code
        self.recall = recall
        self.recall_rows = rows // 4
        self.code_rows = rows - self.recall_rows
        self.seed = seed

    def __call__(self, step: int) -> Tensor:
        """Rows of step ``step``, shape (rows, sequence length), int64."""
        code = self.code.batch(step, 0, self.code_rows, self.recall.shape[1], self.seed)
        epoch, place = divmod(step * self.recall_rows, len(self.recall))
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.recall))
        picks = np.take(order, range(place, place + self.recall_rows), mode="wrap")
        return torch.from_numpy(np.concatenate([code, self.recall[np.sort(picks)].astype(np.int64)]))


def save_state(work: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, progress: Progress) -> None:
    """Write weights, AdamW moments and progress to ``work/state``, replacing the last ones at once."""
    moments: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            moments[f"{name}:{key}"] = optimizer.state[parameter][key]
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with atomic_directory(work / STATE, overwrite=True) as partial:
        save_file(weights, partial / "weights.safetensors")
        save_file(moments, partial / "moments.safetensors")
        (partial / "progress.json").write_text(json.dumps(vars(progress)), encoding="utf-8")


def load_state(work: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW) -> Progress:
    """Take up the state of ``work``; a folder without one starts anew."""
    folder = work / STATE
    if not folder.exists():
        return Progress()
    progress = Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
    weights = load_file(folder / "weights.safetensors")
    moments = load_file(folder / "moments.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
            state: dict[str, Tensor] = {"step": torch.tensor(float(progress.step), device=parameter.device)}
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = moments[f"{name}:{key}"].to(parameter.device)
            optimizer.state[parameter] = state
    return progress


def take_up_export(folder: Path, model: LlamaForCausalLM, log: Path) -> Progress:
    """Go on from an export when the state was lost: its weights and log, fresh moments, a new warm-up."""
    weights: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(shard))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    log.write_bytes((folder / "training_log.jsonl").read_bytes())
    last = read_json_lines(log)[-1]
    progress = Progress(**{key: last[key] for key in vars(Progress())})
    progress.warm_up_from = progress.step
    return progress


def export(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, log: Path, shard_size: str
) -> None:
    """Write the model in bfloat16 with its tokenizer and training log, replacing an earlier export."""
    with atomic_directory(folder, overwrite=True) as partial:
        weights = copy.deepcopy(model)
        nn.Module.to(weights, "cpu", torch.bfloat16)
        weights.generation_config = GenerationConfig.from_model_config(model.config)
        weights.save_pretrained(partial, max_shard_size=shard_size)
        tokenizer.save_pretrained(partial)
        (partial / "training_log.jsonl").write_bytes(log.read_bytes())


def fall_back_if_compile_fails(
    plain: Callable[..., Tensor], model: LlamaForCausalLM, rows: Tensor, compiled: bool
) -> Callable[..., Tensor]:
    """Compile the loss and try it forward and backward; return the plain one if the compiler cannot do it."""
    if not compiled:
        return plain
    fast = torch.compile(plain, dynamic=False)
    try:
        fast(model, rows).backward()
    except Exception as error:  # noqa: BLE001 - whatever the compiler trips over, slow training beats none
        print(f"going on without torch.compile: {type(error).__name__}: {str(error)[:500]}", flush=True)
        return plain
    finally:
        model.zero_grad(set_to_none=True)
    return fast
