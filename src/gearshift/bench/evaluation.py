"""How fast placements are evaluated, against plain forward passes; the row `evaluation_floor_fraction`.

    python -m gearshift.bench.evaluation --shape 200m --out benchmarks/search.json

Weights are random: an evaluation takes as long with them as with trained ones.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gearshift.bench.shapes import SHAPES, named_shape
from gearshift.evaluate.evaluator import Evaluator
from gearshift.evaluate.held_out import HeldOut
from gearshift.evaluate.prefixes import in_tree_order, layers_saved
from gearshift.files import read_json, write_json
from gearshift.placement import Placement
from gearshift.progress import show_progress
from gearshift.provenance import hardware, provenance
from gearshift.supernet import SupernetForCausalLM
from gearshift.train.device import choose_device

BAR = 0.6


def measure_evaluation(
    shape: str,
    *,
    placements: int = 64,
    windows: int = 64,
    tokens: int = 1024,
    batch_size: int | None = None,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate random placements of a supernet with random weights.

    Args:
        shape: see `gearshift.bench.shapes`.
        placements: how many.
        windows: of random text, each of ``tokens`` tokens.
        tokens: of a window.
        batch_size: windows at a time; None for what fits.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: of weights, windows and placements.

    Raises:
        ShapeError: there is no such shape.
    """
    sizes = named_shape(shape)
    torch.manual_seed(seed)
    with torch.device(choose_device(device)):
        model = SupernetForCausalLM(sizes.config())
    text = np.random.default_rng(seed).integers(sizes.vocabulary, size=(windows, tokens))
    evaluator = Evaluator(model, HeldOut("random", text, ()), batch_size)
    space, rng = model.placement_space, random.Random(seed)
    drawn: set[Placement] = set()
    while len(drawn) < min(placements, space.size):
        drawn.add(space.sample_composition(rng))
    wanted = in_tree_order(list(drawn), space)
    # Kernels are compiled and chosen at the first pass of each mixer.
    evaluator.measure_floor([space.mostly(mixer) for mixer in space.mixers])
    batches = len(evaluator.windows)
    with show_progress("evaluate", batches) as report:
        evaluator.score(wanted, lambda done: report(done, "batches"))
    evaluator.measure_floor(wanted)
    speed = evaluator.speed
    return {
        "shape": shape,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "placements": len(wanted),
        "windows": windows,
        "tokens": tokens,
        "batch_size": len(evaluator.windows[0]),
        "evaluation_floor_fraction": speed.floor_fraction,
        "bar": BAR,
        "placements_per_hour": speed.per_hour,
        "floor_seconds": speed.floor_seconds,
        "seconds": speed.seconds,
        "layers_saved": layers_saved(wanted),
        "hardware": hardware(),
        "provenance": provenance(),
    }


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Put a row into the file of search benchmarks, in place of an older one of its shape and hardware."""
    content = read_json(path) if path.exists() else {}
    same = (row["shape"], row["hardware"])
    kept = [old for old in content.get("evaluation", []) if (old["shape"], old["hardware"]) != same]
    write_json(path, {**content, "evaluation": [*kept, row]})


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file of search benchmarks")
    parser.add_argument("--shape", default="200m", choices=list(SHAPES))
    parser.add_argument("--placements", type=int, default=64)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    row = measure_evaluation(**arguments)
    add_row(out, row)
    print(
        f"evaluation_floor_fraction {row['evaluation_floor_fraction']:.2f} (bar {BAR}), "
        f"{row['placements_per_hour']:,.0f} placements an hour, {row['layers_saved']:.0%} of layers shared; "
        f"written to {out}"
    )


if __name__ == "__main__":
    main()
