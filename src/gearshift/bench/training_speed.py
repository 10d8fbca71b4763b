"""Speed and memory of training steps: distillation beside plain training, and losses by vocabulary.

Every measurement runs in a process of its own, so that the peak of one is not that of another.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.optim import AdamW

from gearshift.convert.convert import supernet_config
from gearshift.convert.initialize import DEFAULT_INITIALIZER, INITIALIZERS
from gearshift.convert.teachers import read_teacher
from gearshift.placement import FULL_ATTENTION, MIXERS, Placement
from gearshift.supernet import SupernetForCausalLM
from gearshift.supernet.config import SupernetConfig
from gearshift.train.device import Precision, choose_device
from gearshift.train.distributed import Group
from gearshift.train.flops import Flops, Sizes
from gearshift.train.head_losses import FullTeacher, HeadWeights, head_losses, tokens_of_chunk
from gearshift.train.layers import LayerSettings, prepare_layers
from gearshift.train.losses import token_weights
from gearshift.train.packing import Batch
from gearshift.train.passes import Passes
from gearshift.train.recipe import Recipe, Scale
from gearshift.train.rows import peak_memory
from gearshift.train.setup import place
from gearshift.train.trainer import BETAS, Trainer, freeze_all_but_mixers

CROSS_ENTROPY = HeadWeights(cross_entropy=1.0)


@dataclass(frozen=True)
class Workload:
    """What a step is.

    Attributes:
        hidden_size: of the model; heads have 128 channels, four of them share keys, the FFN is 4 times as
            wide.
        layers: of the model.
        vocabulary: of the model.
        tokens: of a sequence.
        sequences: of a micro-batch.
        steps: that are timed, after two that are not.
        head_dim: channels of a head.
        device: where.
        tflops: what the GPU can do, in TFLOP/s.
        scale: of both.
    """

    hidden_size: int = 2048
    layers: int = 20
    vocabulary: int = 32768
    tokens: int = 4096
    sequences: int = 8
    steps: int = 8
    head_dim: int = 128
    device: str = "auto"
    tflops: float = 800.0
    scale: Scale = Scale(compile=True)

    def config(self, mixers: tuple[str, ...]) -> SupernetConfig:
        """A supernet of a Llama of these sizes."""
        heads = self.hidden_size // self.head_dim
        fields = {
            "model_type": "llama",
            "hidden_size": self.hidden_size,
            "intermediate_size": 4 * self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads // 4),
            "vocab_size": self.vocabulary,
            "max_position_embeddings": max(8 * self.tokens, 256),
            "rms_norm_eps": 1e-5,
        }
        teacher = read_teacher(fields, "the benchmark's teacher")
        return supernet_config(teacher, mixers, None, INITIALIZERS[DEFAULT_INITIALIZER])

    def batch(self, device: torch.device) -> Batch:
        """Random tokens."""
        shape = (self.sequences, self.tokens)
        ids = torch.randint(0, self.vocabulary, shape, generator=torch.Generator().manual_seed(0))
        counted = torch.ones(shape, dtype=torch.bool)
        counted[:, -1] = False
        return Batch(ids, counted, ids.roll(-1, 1), None, ids.numel()).to(device)


@dataclass(frozen=True)
class Measured:
    """One measurement.

    Attributes:
        seconds: median of a step.
        tokens_per_second: by that.
        memory: most bytes held.
        parameters: of the model.
        utilisation: share of the GPU's products that were useful.
    """

    seconds: float
    tokens_per_second: float
    memory: int
    parameters: int
    utilisation: float


def alone(run: Callable[..., Any], *given: Any) -> Any:  # noqa: ANN401 - whatever it returns
    """Run a function of this module in a process of its own."""
    # Spawned, since a forked process cannot use a GPU that its parent has touched.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *given).result()


def measure_distillation(workload: Workload, sampling: str = "uniform") -> Measured:
    """Steps of distillation with forward KL and activation matching; mixers are trained."""
    device = choose_device(workload.device)
    group = Group(0, 1, device)
    with TemporaryDirectory() as folder:
        recipe = _recipe(workload, sampling, Path(folder))
        model = _model(workload.config(MIXERS), device)
        freeze_all_but_mixers(model)
        precision, settings = Precision.of(device), LayerSettings()
        settings.recompute = workload.scale.activation_checkpointing
        place(model, settings, precision, recipe, group)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        passes = Passes(model, model, settings, precision, 1, workload.scale.head_logits)
        trainer, batch = Trainer(passes, trained, recipe, group), workload.batch(device)
        step = iter(range(1, workload.steps + 3))
        drawn: list[list[str]] = []

        def take() -> None:
            result = trainer.train_step(next(step), [batch])
            drawn.extend(list(Placement.parse(text)) for text in result.placements)

        sizes = Sizes.of(workload.config(MIXERS))
        seconds = _time(take, workload)
        flops = Flops(sizes, workload.tokens).step(recipe.stages[0], drawn[2:], attention=False)
        return _measured(workload, seconds, flops, device, sizes.total)


def measure_plain(workload: Workload) -> Measured:
    """Steps of plain training of the teacher alone: every weight, next-token cross-entropy, AdamW."""
    device = choose_device(workload.device)
    config = workload.config((FULL_ATTENTION,))
    model, precision = _model(config, device), Precision.of(device)
    settings = LayerSettings(recompute=workload.scale.activation_checkpointing)
    prepare_layers(model, settings, workload.scale.compile)
    optimizer = AdamW(model.parameters(), lr=1e-5, betas=BETAS, fused=True)
    batch, names = workload.batch(device), [FULL_ATTENTION] * workload.layers
    weight_N = token_weights(batch.counted, batch.counted.flatten())
    chunk = tokens_of_chunk(workload.scale.head_logits, workload.vocabulary)

    def take() -> None:
        optimizer.zero_grad(set_to_none=True)
        with precision.autocast():
            hidden, _ = model.hidden_states(batch.input_ids, names)
            loss, _ = head_losses(
                hidden.flatten(0, 1),
                model.lm_head.weight,
                CROSS_ENTROPY,
                weight_N,
                targets_N=batch.targets.flatten(),
                chunk=chunk,
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    sizes = Sizes.of(config)
    seconds = _time(take, workload)
    flops = 3 * Flops(sizes, workload.tokens).forward(names)
    return _measured(workload, seconds, flops, device, sizes.total)


def measure_head(workload: Workload) -> int:
    """Bytes that forward and reverse KL and cross-entropy with their gradients take, beside the head."""
    device = choose_device(workload.device)
    # On a CPU memory is that of the whole process, of which torch itself is a part.
    before = peak_memory(device)
    size, count = workload.hidden_size, workload.tokens * workload.sequences
    head = torch.randn(workload.vocabulary, size, device=device)
    hidden = torch.randn(count, size, device=device, requires_grad=True)
    teacher = FullTeacher(torch.randn(count, size, device=device), head)
    targets = torch.zeros(count, dtype=torch.long, device=device)
    weights = HeadWeights(forward_kl=1.0, reverse_kl=1.0, cross_entropy=1.0)
    weight_N = token_weights(None, hidden)
    chunk = tokens_of_chunk(workload.scale.head_logits, workload.vocabulary)
    loss, _ = head_losses(hidden, head, weights, weight_N, teacher=teacher, targets_N=targets, chunk=chunk)
    loss.backward()
    return peak_memory(device) - before - head.nbytes


def vocabulary_memory(workload: Workload, small: int, large: int) -> tuple[int, int]:
    """What :func:`measure_head` says of two vocabularies."""
    first, second = (alone(measure_head, replace(workload, vocabulary=size)) for size in (small, large))
    return first, second


def _recipe(workload: Workload, sampling: str, folder: Path) -> Recipe:
    stage = {
        "stage": "distill",
        "steps": workload.steps + 2,
        "batch_size": workload.sequences,
        "sequence_length": workload.tokens,
        "packing": "stream",
        "sampling": sampling,
        "learning_rate": 1e-5,
    }
    places = {"supernet": folder, "out": folder / "out", "data": [folder / "none.txt"]}
    values = {**places, "stages": [stage], "scale": workload.scale.model_dump(), "seed": 0}
    return Recipe.model_validate(values)


def _model(config: SupernetConfig, device: torch.device) -> SupernetForCausalLM:
    torch.manual_seed(0)
    with device:
        return SupernetForCausalLM(config).float().train()


def _time(take: Callable[[], None], workload: Workload) -> float:
    """Median seconds of a step; two before them compile and fill caches."""
    seconds = []
    for _ in range(workload.steps + 2):
        began = time.perf_counter()
        take()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def _measured(
    workload: Workload, seconds: float, flops: float, device: torch.device, parameters: int
) -> Measured:
    tokens = workload.tokens * workload.sequences
    utilisation = flops * tokens / seconds / (workload.tflops * 1e12)
    return Measured(seconds, tokens / seconds, peak_memory(device), parameters, utilisation)
