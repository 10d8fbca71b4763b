"""The whole teacher script on a processor with a tiny model: save, resume, finish, load, take up."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import torch
from make_teacher import Sizes, call, parse
from teacher_training import Shape
from transformers import AutoModelForCausalLM, AutoTokenizer

from gearshift.train.data import standard_library_root

_SHAPE = Shape(
    vocabulary=800,
    hidden=64,
    intermediate=96,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    context=256,
    batch_rows=8,
)


def smoke(corpus: list[Path] | None) -> None:
    """Prepare, train, save, resume, finish, export, load; raises if any of it goes wrong."""
    roots = corpus or [standard_library_root() / "json", standard_library_root() / "asyncio"]
    sizes = Sizes(
        _SHAPE,
        recall_rows=256,
        held_out_rows=4,
        recall_examples=2,
        final_recall_examples=2,
        evaluate_seconds=4.0,
        report_seconds=1.0,
        finish_seconds=3.0,
    )
    with tempfile.TemporaryDirectory() as name:
        work, out = Path(name, "work"), Path(name, "out")
        base = ["--work", str(work), "--out", str(out), "--no-compile"]
        call(sizes, roots, parse([*base, "--minutes", "0.5"]), time.monotonic())
        call(sizes, roots, parse([*base, "--minutes", "0.3", "--finish"]), time.monotonic())
        check(out)
        lost = parse([*base[2:], "--work", str(work) + "-lost", "--take-up", str(out), "--minutes", "0.15"])
        call(sizes, roots, lost, time.monotonic())
    print("smoke run: all parts work", flush=True)


def check(out: Path) -> None:
    """Load the exported model and see that the second call went on where the first stopped."""
    rows = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    starts = [row["step"] for row in rows if row["event"] == "start"]
    assert len(starts) == 2 and starts[0] == 0 < starts[1], starts
    losses = [row["loss"] for row in rows if row["event"] == "step"]
    assert losses[-1] < losses[0], losses
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == _SHAPE.layers and model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer.encode("def f(x):\n    return 1234\n", return_tensors="pt")
    assert tokenizer.decode(ids[0]) == "def f(x):\n    return 1234\n"
    assert torch.isfinite(model(ids).logits).all()
    files = sorted(path.name for path in out.iterdir())
    assert len(files) <= 8, files
    print(f"exported: {files}", flush=True)
