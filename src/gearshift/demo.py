"""The whole road on the shipped teacher, in a few minutes on a laptop's processor.

Everything it reads is in the repository or on every machine that runs Python: the text is the standard
library's source, read at run time, and generated recall tasks. Finished steps of an interrupted run are kept.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gearshift.errors import GearshiftError
from gearshift.evaluate.recall import TASKS, make_examples, make_training_text, write_examples
from gearshift.evaluate.table import Row
from gearshift.find_presets import Found, find_presets, with_measurements, write_found
from gearshift.placement import FULL_ATTENTION, Placement, PlacementSpace, short_name
from gearshift.presets import Preset
from gearshift.train.data import is_held_out, python_sources, standard_library_root, write_documents

REPOSITORY = Path(__file__).resolve().parents[2]
TEACHER = REPOSITORY / "teachers" / "python-11m"
RECIPE = REPOSITORY / "recipes" / "demo.yaml"

SEED = 0
TRAINING_DOCUMENTS = 250
RECALL_TEXTS_PER_TASK = 40
# Placements that the surrogate is fitted to, and others that it is judged by.
FITTED, JUDGED = 80, 32
QUICK_TOKENS, FINAL_TOKENS = 1024, 4096
# Tokens that a placement sees at a time: twice the sliding window, which would cost nothing otherwise.
SEQUENCE_TOKENS = 512
RECALL_LENGTHS = (300, 800)
RECALL_EXAMPLES = 4
CONTEXT_LENGTHS = (512, 2048)
DECODE_BATCH = 8
ROUNDS = 5
SHOWN_PRESETS = 3
PROMPT = "import json\n\n\ndef read_config(path):\n"
PROMPT_TOKENS = 48


class DemoError(GearshiftError):
    """The demo lacks something it needs."""


@dataclass(frozen=True)
class DemoFiles:
    """Where the demo writes what."""

    root: Path

    @property
    def train(self) -> Path:
        """Text to distil on."""
        return self.root / "data" / "train.jsonl"

    @property
    def held_out(self) -> Path:
        """Text that no training step has seen."""
        return self.root / "data" / "held_out.jsonl"

    @property
    def recall(self) -> Path:
        """Recall examples."""
        return self.root / "data" / "recall.jsonl"

    @property
    def converted(self) -> Path:
        """The supernet before training."""
        return self.root / "converted"

    @property
    def distilled(self) -> Path:
        """The run directory of the distillation."""
        return self.root / "distilled"

    @property
    def supernet(self) -> Path:
        """The distilled supernet."""
        return self.distilled / "supernet"

    @property
    def fitted(self) -> Path:
        """Evaluated placements that the surrogate is fitted to."""
        return self.root / "fitted.jsonl"

    @property
    def judged(self) -> Path:
        """Evaluated placements that it is judged by."""
        return self.root / "judged.jsonl"

    @property
    def presets(self) -> Path:
        """The presets' own evaluation, on more text and with recall tasks."""
        return self.root / "presets.jsonl"

    @property
    def frontier(self) -> Path:
        """Surrogate, costs, frontier and pictures."""
        return self.root / "frontier"


def run_demo(out: Path, teacher: Path | None = None) -> None:
    """Convert, distil, evaluate, search and answer at several speeds.

    Args:
        out: the folder for everything; finished steps found there are not done again.
        teacher: a Llama-like model directory; the shipped one if None.

    Raises:
        DemoError: the shipped teacher or recipe is not where the repository has it.
        GearshiftError: a step cannot be done.
    """
    began = time.monotonic()
    teacher = _shipped(TEACHER) if teacher is None else teacher
    files = DemoFiles(out)
    with _step("text: the standard library's source and generated recall tasks"):
        write_texts(files)
    with _step(f"convert: four mixers in every layer of {teacher.name}"):
        _convert(teacher, files)
    with _step("distil: the new mixers learn from the teacher"):
        _distil(files)
    with _step("check: with full attention everywhere it still is the teacher"):
        print(f"   largest difference of a logit: {_distance_from(teacher, files):.1e}")
    with _step(f"evaluate: {FITTED} placements to fit the surrogate, {JUDGED} to judge it"):
        fitted, judged = _evaluate(files)
    with _step("measure: decode steps on this machine"):
        costs = _measure(files.supernet, [])
    with _step("search: surrogate, cost model and the exact frontier"):
        found = find_presets(fitted, costs, _space(files), held_out=judged)
        print(found.frontier.surrogate.report)
        print(found.frontier.cost)
    with _step("presets: their real quality and speed"):
        found = _measure_presets(files, found, costs)
        write_found(found, files.frontier, files.supernet)
    with _step("generate: one prompt, three speeds"):
        _generate(files.supernet, found.presets)
    _print_table(found.presets)
    _say_next(files, time.monotonic() - began)


@contextmanager
def _step(title: str) -> Iterator[None]:
    print(f"\n== {title}", flush=True)
    began = time.monotonic()
    yield
    print(f"   done in {time.monotonic() - began:.0f} s", flush=True)


def _shipped(path: Path) -> Path:
    if not path.exists():
        raise DemoError(
            f"{path} is not there; the demo runs from a clone of the repository, installed with 'make demo' "
            "or 'pip install -e .', or with --teacher DIRECTORY"
        )
    return path


def write_texts(files: DemoFiles) -> None:
    """Write training text, held-out text and recall examples, each in one step; existing ones are kept."""
    if all(path.exists() for path in (files.train, files.held_out, files.recall)):
        return
    sources = list(python_sources(standard_library_root()))
    train = [text for name, text in sources if not is_held_out(name)]
    held_out = [text for name, text in sources if is_held_out(name)]
    rng = random.Random(SEED)
    recall = [
        make_training_text(task, rng, rng.choice((600, 1200, 2400)))
        for task in TASKS
        for _ in range(RECALL_TEXTS_PER_TASK)
    ]
    write_documents(files.train, rng.sample(train, min(TRAINING_DOCUMENTS, len(train))) + recall)
    write_documents(files.held_out, held_out)
    write_examples(files.recall, make_examples(RECALL_EXAMPLES, SEED + 1, RECALL_LENGTHS))


def _convert(teacher: Path, files: DemoFiles) -> None:
    from gearshift.convert import convert_teacher

    if not files.converted.exists():
        convert_teacher(teacher, files.converted, seed=SEED)


def _distil(files: DemoFiles) -> None:
    from gearshift.train.recipe_file import load_recipe
    from gearshift.train.run import train

    places = [f"supernet={files.converted}", f"out={files.distilled}", f"data=[{files.train}]"]
    train(load_recipe(_shipped(RECIPE), places), resume=True)


def _distance_from(teacher: Path, files: DemoFiles) -> float:
    """The largest absolute difference between the teacher's logits and those of all-FA, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from gearshift.supernet import load_supernet
    from gearshift.train.tokens import load_tokenizer

    text = files.held_out.read_text(encoding="utf-8")[:2000]
    tokens = load_tokenizer(teacher)(text, return_tensors="pt").input_ids[:, :SEQUENCE_TOKENS]
    reference = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32, local_files_only=True)
    supernet = load_supernet(files.supernet)
    with torch.inference_mode():
        placement = supernet.placement_space.mostly(FULL_ATTENTION)
        return float((supernet(tokens, placement=placement).logits - reference(tokens).logits).abs().max())


def _space(files: DemoFiles) -> PlacementSpace:
    from gearshift.supernet.checkpoint import read_config

    return read_config(files.supernet).placement_space


def _evaluate(files: DemoFiles) -> tuple[list[Row], list[Row]]:
    """Rows of the placements to fit, those with one mixer everywhere among them, and of the others."""
    space = _space(files)
    uniform = [space.mostly(mixer) for mixer in space.mixers]
    rng = random.Random(SEED)
    drawn = dict.fromkeys(uniform)
    while len(drawn) < FITTED + JUDGED:
        drawn[space.sample_composition(rng)] = None
    placements = iter(drawn)
    fitted = _evaluate_quickly(files, list(islice(placements, FITTED)), files.fitted)
    return fitted, _evaluate_quickly(files, list(placements), files.judged)


def _evaluate_quickly(files: DemoFiles, placements: list[Placement], table: Path) -> list[Row]:
    from gearshift.evaluate.quality import evaluate_placements

    return evaluate_placements(
        files.supernet,
        placements,
        files.held_out,
        None,
        table,
        tokens=QUICK_TOKENS,
        sequence_length=SEQUENCE_TOKENS,
        batch_size=QUICK_TOKENS // SEQUENCE_TOKENS,
    )


def _measure(supernet: Path, presets: Sequence[Preset]) -> list[Row]:
    """Decode steps of the presets, or without any of what a cost model is fitted to."""
    from gearshift.bench.decode import DecodeSettings, cost_placements, measure_decode
    from gearshift.supernet import load_supernet

    model = load_supernet(supernet)
    placements = [preset.placement for preset in presets] or cost_placements(model.placement_space)
    settings = DecodeSettings(DECODE_BATCH, rounds=ROUNDS)
    return measure_decode(model, placements, CONTEXT_LENGTHS, settings)


def _measure_presets(files: DemoFiles, found: Found, costs: Sequence[Row]) -> Found:
    """The same presets with what they really retain and how fast they really are."""
    from gearshift.evaluate.quality import evaluate_placements

    placements = [preset.placement for preset in found.presets]
    rows = evaluate_placements(
        files.supernet,
        placements,
        files.held_out,
        files.recall,
        files.presets,
        tokens=FINAL_TOKENS,
        sequence_length=SEQUENCE_TOKENS,
    )
    steps = _measure(files.supernet, found.presets)
    return found.with_presets(with_measurements(found.presets, rows, steps))


def _generate(supernet: Path, presets: Sequence[Preset]) -> None:
    from gearshift.generate import generate_side_by_side
    from gearshift.supernet import load_supernet
    from gearshift.train.tokens import load_tokenizer

    shown = [presets[0], *presets[1:][-(SHOWN_PRESETS - 1) :]]
    placements = {preset.name: preset.placement for preset in shown}
    model, tokenizer = load_supernet(supernet), load_tokenizer(supernet)
    for result in generate_side_by_side(model, tokenizer, PROMPT, placements, max_new_tokens=PROMPT_TOKENS):
        print(f"\n-- {result.name}: {result.placement} ({result.tokens_per_second:.0f} tokens/s)")
        print(PROMPT + result.text)


def _print_table(presets: Sequence[Preset]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="\npresets, measured on this machine in this run", title_justify="left")
    speeds = [f"speed-up @{length}" for length in CONTEXT_LENGTHS]
    for column in ("preset", "layers", "retention", *speeds):
        table.add_column(column)
    for preset in presets:
        table.add_row(*_cells(preset))
    Console().print(table)


def _cells(preset: Preset) -> list[str]:
    layers = " ".join(f"{count} {short_name(mixer)}" for mixer, count in preset.placement.counts().items())
    measured = "-" if preset.retention is None else f"{preset.retention:.1%}"
    by_context = {m.workload.context_length: m.speed_up for m in preset.measurements}
    return [preset.name, layers, measured, *(f"{by_context[length]:.2f}" for length in CONTEXT_LENGTHS)]


def _say_next(files: DemoFiles, seconds: float) -> None:
    print(f"\nthe whole road took {seconds / 60:.1f} minutes; look at {files.frontier / 'frontier.html'}")
    print("try next:")
    print(f"  gearshift info {files.supernet}")
    print(f"  gearshift generate {files.supernet} 'def main():'")
    print(f"  gearshift generate {files.supernet} 'def main():' --placement 'fa*2 swa*8 gdn*2'")
    more = files.root / "more.jsonl"
    print(f"  gearshift evaluate {files.supernet} --data {files.held_out} --random 20 --out {more}")
