"""Figures of training: speed and memory beside plain training, and what stages, samplings and settings teach.

    python -m gearshift.bench.training --out benchmarks/training.json

``kd_vs_plain`` and ``mfu_long`` need a GPU; ``align``, ``sampling`` and ``attention`` train the
shipped teacher, several seeds each, and go on where they were below ``--work``. Rows of the first kind say
metric, value, baseline, ratio and bar.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gearshift.bench.initialization import TEACHER, write_texts
from gearshift.bench.training_speed import (
    Workload,
    alone,
    measure_distillation,
    measure_plain,
    vocabulary_memory,
)
from gearshift.convert import convert_teacher
from gearshift.evaluate.quality import evaluate_placements
from gearshift.files import write_json
from gearshift.placement import Placement
from gearshift.provenance import provenance
from gearshift.supernet.checkpoint import read_config
from gearshift.train.recipe import Recipe
from gearshift.train.run import train

Row = dict[str, Any]
# Of the layers, the share that keeps full attention in the placements that are judged; the rest is spread.
JUDGED = {"all-gdn": (0.0, ("gdn",)), "balanced": (0.25, ("swa", "gdn", "kda")), "fa-heavy": (0.75, ("gdn",))}
SHARES = (0.05, 0.1, 0.25, 0.5, 1.0)
BARS = {"kd_vs_plain_tokens": 0.85, "kd_vs_plain_memory": 1.0, "mfu": 0.4, "vocab_memory": 1.1}
VOCABULARIES = (16384, 131072)


@dataclass(frozen=True)
class Lessons:
    """How much is learned in the figures about quality.

    Attributes:
        tokens: of a run.
        batch_size: sequences of a step.
        sequence_length: tokens of each.
        learning_rate: of every run.
        held_out_tokens: to judge by.
        seeds: how many.
        device: where.
        teacher: a teacher directory.
        shares: of ``tokens``, tried by ``align``.
    """

    tokens: int = 5_000_000
    batch_size: int = 16
    sequence_length: int = 512
    learning_rate: float = 2e-3
    held_out_tokens: int = 32_768
    seeds: int = 3
    device: str = "auto"
    teacher: Path = TEACHER
    shares: Sequence[float] = field(default=SHARES)

    def steps(self, share: float = 1.0) -> int:
        """Steps of so large a part of a run."""
        return max(2, round(share * self.tokens / (self.batch_size * self.sequence_length)))


class School:
    """Trains the shipped teacher's supernet in several ways and judges it; finished runs are kept.

    Args:
        work: the folder of all runs.
        lessons: how much.
    """

    def __init__(self, work: Path, lessons: Lessons) -> None:
        self.work, self.lessons = work, lessons
        write_texts(work)
        self.start = work / "start"
        if not self.start.exists():
            convert_teacher(lessons.teacher, self.start)
        layers = read_config(self.start).placement_space.num_layers
        self.placements = {name: spread(layers, *how) for name, how in JUDGED.items()}

    def run(self, name: str, stages: Sequence[Row], seed: int, **changes: Any) -> dict[str, float]:  # noqa: ANN401
        """Held-out losses of the judged placements after these stages."""
        lessons = self.lessons
        common = {
            "batch_size": lessons.batch_size,
            "sequence_length": lessons.sequence_length,
            "packing": "stream",
            "learning_rate": lessons.learning_rate,
        }
        recipe = Recipe.model_validate(
            {
                "supernet": self.start,
                "out": self.work / f"{name}-{seed}",
                "data": [self.work / "train.jsonl"],
                "stages": [common | {"warmup_steps": stage["steps"] // 10} | stage for stage in stages],
                "seed": seed,
                "save_every": 10_000,
                "device": lessons.device,
                **changes,
            }
        )
        return self._judge(train(recipe, resume=True))

    def _judge(self, supernet: Path) -> dict[str, float]:
        rows = evaluate_placements(
            supernet,
            list(self.placements.values()),
            self.work / "held_out.jsonl",
            None,
            self.work / "evaluations.jsonl",
            tokens=self.lessons.held_out_tokens,
            sequence_length=self.lessons.sequence_length,
            device=self.lessons.device,
        )
        return {name: row["loss"] for name, row in zip(self.placements, rows, strict=True)}


def spread(layers: int, share: float, mixers: Sequence[str]) -> Placement:
    """Full attention in a share of the layers, evenly spread, and the other mixers in turn."""
    attention = {round(index / share) for index in range(round(layers * share))} if share else set()
    others = iter(range(layers))
    return Placement.parse(
        " ".join("fa" if n in attention else mixers[next(others) % len(mixers)] for n in range(layers))
    )


def align_rows(school: School) -> Iterator[Row]:
    """Tokens that alignment and then distillation take to the quality of distillation alone."""
    lessons = school.lessons
    for seed in range(lessons.seeds):
        steps = lessons.steps()
        alone_ = school.run("uniform", [{"stage": "distill", "steps": steps}], seed)
        yield {"figure": "align", "line": "uniform", "seed": seed, "tokens": lessons.tokens, **alone_}
        for share in lessons.shares:
            half = max(1, lessons.steps(share) // 2)
            stages = [{"stage": "align", "steps": half}, {"stage": "distill", "steps": half}]
            losses = school.run(f"align-{share}", stages, seed)
            reached = _mean(losses) <= _mean(alone_)
            row = {"figure": "align", "line": "align, then uniform", "seed": seed, "ratio": share}
            yield {**row, "tokens": round(share * lessons.tokens), **losses, "reached": reached}
            if reached:
                break


def sampling_rows(school: School) -> Iterator[Row]:
    """Held-out losses after as many tokens with each way of drawing placements."""
    presets = {str(placement): 1.0 for placement in school.placements.values()}
    ways = {
        "uniform": "uniform",
        "composition": "composition",
        "presets": {"presets": presets},
        "mixture": {"uniform": 0.25, "composition": 0.5, "presets": {text: 1 / 12 for text in presets}},
    }
    for seed in range(school.lessons.seeds):
        for name, sampling in ways.items():
            stage = {"stage": "distill", "steps": school.lessons.steps(), "sampling": sampling}
            losses = school.run(f"sampling-{name}", [stage], seed)
            yield {"figure": "sampling", "line": name, "seed": seed, **losses}


def attention_rows(school: School) -> Iterator[Row]:
    """Held-out losses with full attention frozen and trained, after as many tokens."""
    for seed in range(school.lessons.seeds):
        for trained in ("mixers", "mixers_and_attention"):
            stage = {"stage": "distill", "steps": school.lessons.steps(), "sampling": "composition"}
            losses = school.run(f"attention-{trained}", [stage], seed, trained=trained)
            yield {"figure": "attention", "line": trained, "seed": seed, **losses}


def speed_rows(workload: Workload) -> Iterator[Row]:
    """Distillation beside plain training: tokens a second, memory, utilisation."""
    plain, distilled = alone(measure_plain, workload), alone(measure_distillation, workload)
    sizes = {"parameters": plain.parameters, "supernet_parameters": distilled.parameters}
    sizes |= {"sequence_length": workload.tokens}
    yield _row("kd_vs_plain_tokens", distilled.tokens_per_second, plain.tokens_per_second) | sizes
    yield _row("kd_vs_plain_memory", distilled.memory, plain.memory) | sizes
    yield _row("mfu", distilled.utilisation, 1.0) | sizes


def long_rows(workload: Workload) -> Iterator[Row]:
    """Utilisation at four times the sequence length, and as many tokens a step."""
    longer = replace(workload, tokens=4 * workload.tokens, sequences=max(1, workload.sequences // 4))
    distilled = alone(measure_distillation, longer)
    yield _row("mfu", distilled.utilisation, 1.0) | {"sequence_length": longer.tokens}


def vocabulary_rows(workload: Workload) -> Iterator[Row]:
    """Memory of the next token's losses with a large vocabulary beside a small one."""
    small, large = vocabulary_memory(workload, *VOCABULARIES)
    yield _row("vocab_memory", large, small) | {"vocabularies": list(VOCABULARIES)}


def _row(metric: str, value: float, baseline: float) -> Row:
    ratio = value / baseline
    return {"metric": metric, "value": value, "baseline": baseline, "ratio": ratio, "bar": BARS[metric]}


def _mean(losses: dict[str, float]) -> float:
    return sum(losses.values()) / len(losses)


SPEED: dict[str, Callable[[Workload], Iterator[Row]]] = {
    "kd_vs_plain": speed_rows,
    "mfu_long": long_rows,
    "vocab_memory": vocabulary_rows,
}
QUALITY: dict[str, Callable[[School], Iterator[Row]]] = {
    "align": align_rows,
    "sampling": sampling_rows,
    "attention": attention_rows,
}


def run_figures(
    figures: Sequence[str], out: Path, work: Path, workload: Workload, lessons: Lessons
) -> list[Row]:
    """Measure figures one after another; the file is written anew after every row."""
    rows: list[Row] = []
    school = School(work, lessons) if any(name in QUALITY for name in figures) else None
    for name in figures:
        found = SPEED[name](workload) if name in SPEED else QUALITY[name](_there(school))
        for row in found:
            rows.append(row)
            print(json.dumps(row), flush=True)
            write_json(out, {"provenance": provenance(), "rows": rows})
    return rows


def _there(school: School | None) -> School:
    assert school is not None
    return school


def main() -> None:
    """Measure what was asked for and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*SPEED, *QUALITY]
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--work", type=Path, default=Path("runs/training"), help="folder for the runs")
    parser.add_argument("--figures", default=",".join(names), help=f"comma-separated: {', '.join(names)}")
    parser.add_argument("--sequences", type=int, default=8, help="of 4096 tokens in a step, for speed")
    parser.add_argument("--seeds", type=int, default=3, help="of the figures about quality")
    parser.add_argument("--tokens", type=int, default=5_000_000, help="of their runs")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    given = parser.parse_args()
    figures = given.figures.split(",")
    if unknown := [name for name in figures if name not in names]:
        parser.error(f"unknown figure {unknown[0]!r}; expected some of {', '.join(names)}")
    workload = Workload(sequences=given.sequences, device=given.device)
    lessons = Lessons(tokens=given.tokens, seeds=given.seeds, device=given.device)
    run_figures(figures, given.out, given.work, workload, lessons)


if __name__ == "__main__":
    main()
