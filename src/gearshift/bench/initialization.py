"""What each idea of the initialisation is worth: losses at the start, calibrated, and distilled.

    python -m gearshift.bench.initialization --out benchmarks/initialization.json

Every line of the ablation takes one idea out of ``aligned`` with calibration. The second table is the bar of
"fewer tokens": the loss that the published recipe, ``modulo``, has after a long distillation, and the losses
that ``aligned`` with calibration has after shorter ones. Every run has a learning rate schedule of its own
length, so a short one is a finished one. Finished pieces below ``--work`` are not done again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
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
# Of the random biases in the teacher with biases, in parts of a channel's own size.
BIAS_SIZE = 0.5
BIASED = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


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
        seeds: of the second table.
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
    seeds: int = 3
    batch_size: int = 8
    sequence_length: int = 512
    learning_rate: float = 2e-3
    held_out_tokens: int = 32_768
    device: str = "auto"


class Bench:
    """The pieces of all lines, each made once and kept below ``work``."""

    def __init__(self, teacher: Path, work: Path, sizes: Sizes) -> None:
        self.teacher, self.work, self.sizes = teacher, work, sizes

    def texts(self) -> tuple[Path, Path]:
        """Text to learn from and held-out text: the standard library's source."""
        learn, judge = self.work / "train.jsonl", self.work / "held_out.jsonl"
        if not (learn.exists() and judge.exists()):
            sources = list(python_sources(standard_library_root()))
            write_documents(learn, (text for name, text in sources if not is_held_out(name)))
            write_documents(judge, (text for name, text in sources if is_held_out(name)))
        return learn, judge

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
        data = self.texts()[0]
        return calibrate(self.start(variant), data, out, settings, device=self.sizes.device, resume=True)

    def distilled(self, variant: Variant, tokens: int, seed: int = 0) -> Path:
        """The supernet after so many tokens of distillation."""
        sizes, start = self.sizes, self.calibrated(variant, seed)
        steps = max(2, round(tokens / (sizes.batch_size * sizes.sequence_length)))
        recipe = DistillRecipe(
            supernet=start,
            out=self.work / _slug(variant.name) / f"distilled-{tokens}-{seed}",
            data=[self.texts()[0]],
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
            self.texts()[1],
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


def start_rows(bench: Bench, variants: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    """Losses at step 0, of every line that starts otherwise than the ones before it."""
    for variant in variants:
        yield {"line": variant.name, "stage": "start", "tokens": 0, **bench.losses(bench.start(variant))}


def calibrated_rows(bench: Bench, variants: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    """Losses after calibration, and which share of the gap to the teacher that closes."""
    for variant in variants:
        if not variant.parts:
            continue
        before, after = bench.losses(bench.start(variant)), bench.losses(bench.calibrated(variant))
        closed = {
            f"{mixer}_closed": (before[mixer] - after[mixer]) / (before[mixer] - before["fa"])
            for mixer in ("gdn", "kda")
        }
        yield {"line": variant.name, "stage": "calibrated", "tokens": 0, **after, **closed}


def distilled_rows(bench: Bench, variants: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    """Losses after the ablation's distillation."""
    tokens = bench.sizes.ablation_tokens
    for variant in variants:
        losses = bench.losses(bench.distilled(variant, tokens))
        yield {"line": variant.name, "stage": "distilled", "tokens": tokens, "seed": 0, **losses}


def fewer_tokens_rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """The published recipe after many tokens, and ``aligned`` with calibration after fewer, seed by seed."""
    sizes = bench.sizes
    for seed in range(sizes.seeds):
        tokens = sizes.published_tokens
        published = bench.losses(bench.distilled(PUBLISHED, tokens, seed))
        yield {"line": PUBLISHED.name, "stage": "distilled", "tokens": tokens, "seed": seed, **published}
        for share in sizes.shares:
            tokens = round(share * sizes.published_tokens)
            losses = bench.losses(bench.distilled(BEST, tokens, seed))
            reached = all(losses[mixer] <= published[mixer] for mixer in ("gdn", "kda"))
            row = {"line": BEST.name, "stage": "distilled", "tokens": tokens, "seed": seed, **losses}
            yield {**row, "share": share, "reached": reached}


PIECES = {
    "start": start_rows,
    "calibrated": calibrated_rows,
    "distilled": distilled_rows,
    "fewer_tokens": lambda bench, variants: fewer_tokens_rows(bench),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the pieces that were asked for, print a line for each row, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/initialization"), help="folder for all pieces"
    )
    parser.add_argument("--pieces", default=",".join(PIECES), help="which, comma-separated")
    parser.add_argument("--lines", help="lines of the ablation, comma-separated; all if left out")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    bench = Bench(TEACHER, given.work, Sizes(device=given.device))
    lines = given.lines.split(",") if given.lines else [variant.name for variant in ABLATION]
    variants = [variant for variant in ABLATION if variant.name in lines]
    write_rows(bench, variants, given.pieces.split(","), given.out)


def write_rows(bench: Bench, variants: Sequence[Variant], pieces: Sequence[str], out: Path) -> None:
    """Do the pieces; the file is written anew after every row."""
    rows: list[dict[str, Any]] = []
    for piece in pieces:
        for row in PIECES[piece](bench, variants):
            rows.append({"piece": piece, **row})
            print(json.dumps(rows[-1]), flush=True)
            write_json(out, {"provenance": provenance(), "sizes": asdict(bench.sizes), "rows": rows})


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


if __name__ == "__main__":
    main()
