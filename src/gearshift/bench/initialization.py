"""What each idea of the initialisation is worth: losses at the start, calibrated, and distilled.

    python -m gearshift.bench.initialization --out benchmarks/initialization.json --workers 6

Every line of the ablation takes one idea out of ``aligned`` with calibration. Then comes the bar of "fewer
tokens": the loss that the published recipe, ``modulo``, has after a long distillation, and the losses that
``aligned`` with calibration has after shorter ones. Every run has a learning rate schedule of its own length,
so a short one is a finished one. Finished pieces below ``--work`` are not done again. Such small models leave
a GPU idle most of the time, so several workers share it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gearshift.convert import convert_teacher
from gearshift.convert.initialize import Aligned, Initializer, Modulo
from gearshift.evaluate.quality import evaluate_placements
from gearshift.files import atomic_directory, write_json
from gearshift.placement import FULL_ATTENTION, GATED_DELTA_NET, KIMI_DELTA_ATTENTION, Placement, short_name
from gearshift.provenance import provenance
from gearshift.supernet.checkpoint import read_config
from gearshift.train.calibrate import PARTS, CalibrationSettings, calibrate
from gearshift.train.data import is_held_out, python_sources, standard_library_root, write_documents
from gearshift.train.distill import distill
from gearshift.train.recipe import DistillRecipe

DELTA_RULES = (GATED_DELTA_NET, KIMI_DELTA_ATTENTION)
TEACHER = Path("teachers/python-11m")
STAGES = ("start", "calibrated", "distilled")
# Of the random biases in the teacher with biases, in parts of a channel's own size.
BIAS_SIZE = 0.5
BIASED = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One way to start.

    Attributes:
        name: a line of the table.
        initializer: the recipe.
        parts: of the calibration; empty for none.
        biased: whether the teacher is the one with biases.
    """

    name: str
    initializer: Initializer
    parts: tuple[str, ...] = PARTS
    biased: bool = False


def _without(part: str) -> tuple[str, ...]:
    return tuple(other for other in PARTS if other != part)


BEST = Variant("aligned", Aligned())
PUBLISHED = Variant("modulo", Modulo(), parts=())
ABLATION = (
    BEST,
    Variant("no calibration", Aligned(), parts=()),
    Variant("pairing h mod G", Aligned(pairing="modulo")),
    Variant("gate closed", Aligned(gate="closed")),
    Variant("one decay for all heads", Aligned(decay="uniform")),
    Variant("decay not from attention", Aligned(), parts=_without("decay")),
    Variant("random convolution", Aligned(convolution="random")),
    Variant("no ridge", Aligned(), parts=_without("ridge")),
    Variant("no layer-wise steps", Aligned(), parts=_without("steps")),
    Variant("with biases: folded", Aligned(), biased=True),
    Variant("with biases: dropped", Aligned(biases="dropped"), biased=True),
    Variant("modulo, calibrated", Modulo()),
    PUBLISHED,
)


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
        calibration: settings; their seed and parts are set by each line.
        ablation_tokens: of distillation in the ablation.
        published_tokens: of distillation of ``modulo``.
        shares: the shorter distillations of ``aligned``, in parts of ``published_tokens``.
        batch_size: sequences in a step of distillation.
        sequence_length: tokens of each.
        learning_rate: of distillation.
        held_out_tokens: to judge by.
        device: where to compute.
    """

    calibration: CalibrationSettings = field(default_factory=lambda: CalibrationSettings(tokens=400_000))
    ablation_tokens: int = 1_000_000
    published_tokens: int = 5_000_000
    shares: tuple[float, ...] = (0.05, 0.1, 0.25)
    batch_size: int = 16
    sequence_length: int = 512
    learning_rate: float = 2e-3
    held_out_tokens: int = 32_768
    device: str = "auto"


class Bench:
    """The pieces of one line, each made once and kept below ``work``.

    Args:
        teacher: a teacher directory.
        texts: what `write_texts` wrote.
        work: the line's own folder.
        sizes: how much of everything.
    """

    def __init__(self, teacher: Path, texts: Path, work: Path, sizes: Sizes) -> None:
        self.teacher, self.work, self.sizes = teacher, work, sizes
        self.learn, self.judge = texts / "train.jsonl", texts / "held_out.jsonl"

    def start(self, variant: Variant) -> Path:
        """The converted supernet."""
        out = self.work / _slug(variant.name) / "start"
        if not out.exists():
            teacher = self._biased_teacher() if variant.biased else self.teacher
            convert_teacher(teacher, out, mixers=(FULL_ATTENTION, *DELTA_RULES), init=variant.initializer)
        return out

    def calibrated(self, variant: Variant, seed: int = 0) -> Path:
        """The calibrated supernet; the converted one, where the line has no calibration."""
        if not variant.parts:
            return self.start(variant)
        out = self.work / _slug(variant.name) / f"calibrated-{seed}"
        settings = replace(self.sizes.calibration, parts=variant.parts, seed=seed)
        return calibrate(
            self.start(variant), self.learn, out, settings, device=self.sizes.device, resume=True
        )

    def distilled(self, variant: Variant, tokens: int, seed: int = 0) -> Path:
        """The supernet after so many tokens of distillation."""
        sizes, start = self.sizes, self.calibrated(variant, seed)
        steps = max(2, round(tokens / (sizes.batch_size * sizes.sequence_length)))
        recipe = DistillRecipe(
            supernet=start,
            out=self.work / _slug(variant.name) / f"distilled-{tokens}-{seed}",
            data=[self.learn],
            steps=steps,
            batch_size=sizes.batch_size,
            sequence_length=sizes.sequence_length,
            sampling="composition",
            learning_rate=sizes.learning_rate,
            warmup_steps=steps // 10,
            seed=seed,
            save_every=steps,
            device=sizes.device,  # pyright: ignore[reportArgumentType] - checked by pydantic
        )
        return distill(recipe, resume=True)

    def losses(self, supernet: Path) -> dict[str, float]:
        """Held-out losses of the teacher and of each delta rule in every layer, by short name."""
        layers = read_config(supernet).placement_space.num_layers
        placements = [Placement.uniform(mixer, layers) for mixer in (FULL_ATTENTION, *DELTA_RULES)]
        rows = evaluate_placements(
            supernet,
            placements,
            self.judge,
            None,
            self.work / "evaluations.jsonl",
            tokens=self.sizes.held_out_tokens,
            sequence_length=self.sizes.sequence_length,
            device=self.sizes.device,
        )
        mixers = (short_name(mixer) for mixer in (FULL_ATTENTION, *DELTA_RULES))
        return {mixer: row["loss"] for mixer, row in zip(mixers, rows, strict=True)}

    def _biased_teacher(self) -> Path:
        out = self.work / "teacher-with-biases"
        if not out.exists():
            make_biased_teacher(self.teacher, out)
        return out


def make_biased_teacher(teacher: Path, out: Path) -> None:
    """A Llama as a Qwen2: the same weights, and random biases on queries, keys and values.

    Args:
        teacher: a Llama directory with one weight file.
        out: where.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(teacher / "model.safetensors")
    for name in [name for name in tensors if name.endswith(BIASED)]:
        weight = tensors[name]
        norm = tensors[name.partition("self_attn")[0] + "input_layernorm.weight"].float()
        size = (weight.float().square() @ norm.square()).mean().sqrt()
        bias = BIAS_SIZE * size * torch.randn(len(weight), generator=generator)
        tensors[name.removesuffix("weight") + "bias"] = bias.to(weight.dtype)
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    with atomic_directory(out) as partial:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copyfile(teacher / name, partial / name)
        write_json(partial / "config.json", config)


def write_texts(folder: Path) -> None:
    """Text to learn from and held-out text: the standard library's source; existing files are kept."""
    learn, judge = folder / "train.jsonl", folder / "held_out.jsonl"
    if learn.exists() and judge.exists():
        return
    sources = list(python_sources(standard_library_root()))
    write_documents(learn, (text for name, text in sources if not is_held_out(name)))
    write_documents(judge, (text for name, text in sources if is_held_out(name)))


def ablation_rows(bench: Bench, variant: Variant, stages: Sequence[str]) -> Iterator[Row]:
    """Losses of one line at the start, after calibration and after the ablation's distillation.

    A row of the calibrated stage says which share of the gap to the teacher is closed.
    """
    line = {"table": "ablation", "line": variant.name, "seed": 0}
    before = bench.losses(bench.start(variant))
    if "start" in stages:
        yield {**line, "stage": "start", "tokens": 0, **before}
    if "calibrated" in stages and variant.parts:
        after = bench.losses(bench.calibrated(variant))
        closed = {
            f"{mixer}_closed": (before[mixer] - after[mixer]) / (before[mixer] - before["fa"])
            for mixer in ("gdn", "kda")
        }
        yield {**line, "stage": "calibrated", "tokens": 0, **after, **closed}
    if "distilled" in stages:
        tokens = bench.sizes.ablation_tokens
        yield {
            **line,
            "stage": "distilled",
            "tokens": tokens,
            **bench.losses(bench.distilled(variant, tokens)),
        }


def fewer_tokens_rows(bench: Bench, seed: int) -> Iterator[Row]:
    """The published recipe after many tokens, and ``aligned`` with calibration after fewer."""
    tokens = bench.sizes.published_tokens
    line = {"table": "fewer tokens", "seed": seed, "stage": "distilled"}
    published = bench.losses(bench.distilled(PUBLISHED, tokens, seed))
    yield {**line, "line": PUBLISHED.name, "tokens": tokens, **published}
    for share in bench.sizes.shares:
        tokens = round(share * bench.sizes.published_tokens)
        losses = bench.losses(bench.distilled(BEST, tokens, seed))
        reached = all(losses[mixer] <= published[mixer] for mixer in ("gdn", "kda"))
        yield {**line, "line": BEST.name, "tokens": tokens, **losses, "share": share, "reached": reached}


@dataclass(frozen=True)
class Job:
    """One line of a table, done by one worker.

    Attributes:
        teacher: a teacher directory.
        work: the folder of all lines.
        sizes: how much of everything.
        variant: a line of the ablation; None for the second table.
        stages: of the ablation.
        seed: of the second table.
    """

    teacher: Path
    work: Path
    sizes: Sizes
    variant: Variant | None = None
    stages: tuple[str, ...] = STAGES
    seed: int = 0

    def run(self) -> list[Row]:
        """Do it; prints a line for each row."""
        name = f"seed-{self.seed}" if self.variant is None else _slug(self.variant.name)
        bench = Bench(self.teacher, self.work, self.work / name, self.sizes)
        if self.variant is None:
            rows = fewer_tokens_rows(bench, self.seed)
        else:
            rows = ablation_rows(bench, self.variant, self.stages)
        return [_shown(row) for row in rows]


def run_jobs(jobs: Sequence[Job], workers: int, out: Path) -> None:
    """Do the jobs, several at a time; the file is written anew after every one of them."""
    # Spawned, since a forked process cannot use a GPU that its parent has touched.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    rows: list[Row] = []
    with pool:
        for done in pool.map(Job.run, jobs):
            rows += done
            write_json(out, {"provenance": provenance(), "sizes": asdict(jobs[0].sizes), "rows": rows})


def main() -> None:
    """Do what was asked for and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/initialization"), help="folder for the pieces"
    )
    parser.add_argument("--stages", default=",".join(STAGES), help="of the ablation, comma-separated")
    parser.add_argument("--lines", help="of the ablation, comma-separated; all if left out")
    parser.add_argument("--seeds", type=int, default=3, help="of the second table; 0 for no such table")
    parser.add_argument("--workers", type=int, default=1, help="lines at a time")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    given = parser.parse_args()
    write_texts(given.work)
    lines = [variant.name for variant in ABLATION] if given.lines is None else given.lines.split(",")
    job = Job(TEACHER, given.work, Sizes(device=given.device), stages=tuple(given.stages.split(",")))
    # The longest jobs first, so that no worker is left alone with one at the end.
    jobs = [replace(job, seed=seed) for seed in range(given.seeds)]
    jobs += [replace(job, variant=variant) for variant in ABLATION if variant.name in lines]
    run_jobs(jobs, given.workers, given.out)


def _shown(row: Row) -> Row:
    print(json.dumps(row), flush=True)
    return row


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


if __name__ == "__main__":
    main()
