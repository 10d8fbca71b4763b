"""Train the small Python-code teacher from nothing but this machine's Python sources.

    PYTHONPATH=src python3 teachers/make_teacher.py --work WORK --out OUT --minutes 9
    PYTHONPATH=src python3 teachers/make_teacher.py --work WORK --out OUT --minutes 9 --finish

A call stops after ``--minutes`` and keeps its state in ``--work``; any number of calls follow one another.
The one with ``--finish`` lets the learning rate decay so that it reaches zero when the time of that call is
over. The decay follows the clock, so the exact number of steps differs between machines; batches, initial
weights and evaluation sets do not.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from teacher_corpus import Corpus, default_roots, prepare, wrap_tokenizer
from teacher_recall import make_pool

from gearshift.files import append_json_line
from gearshift.provenance import provenance
from gearshift.train.data import PackedTokens

if TYPE_CHECKING:
    import torch
    from teacher_evaluation import RecallRow
    from teacher_training import Batches, Progress, Shape
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 20
SHARD_SIZE = "14MB"


@dataclass(frozen=True)
class Sizes:
    """How much is made and measured; the smoke run takes a small part of everything."""

    shape: Shape
    recall_rows: int = 65_536
    held_out_rows: int = 64
    recall_examples: int = 32
    final_recall_examples: int = 100
    evaluate_seconds: float = 75.0
    report_seconds: float = 10.0
    finish_seconds: float = 25.0


@dataclass
class Run:
    """Everything that the training loop works on."""

    sizes: Sizes
    work: Path
    model: LlamaForCausalLM
    optimizer: torch.optim.AdamW
    loss: Callable[..., torch.Tensor]
    precision: Callable[[], torch.autocast]
    batches: Batches
    held_out: torch.Tensor
    tokenizer: PreTrainedTokenizerFast
    recall: list[RecallRow]
    progress: Progress
    log: Path
    last_loss: float = field(default=float("nan"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one call."""
    began = time.monotonic()
    options = parse(arguments)
    if options.smoke:
        from smoke import smoke

        smoke(options.corpus)
        return
    from teacher_training import Shape

    roots = options.corpus or default_roots()
    call(Sizes(Shape()), roots, options, began)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    add = parser.add_argument
    add("--work", type=Path, default=Path("teacher-work"), help="corpus and state between calls")
    add("--out", type=Path, help="where the model is written at the end of the call")
    add("--minutes", type=float, default=9.0, help="time for this call, preparation included")
    add("--finish", action="store_true", help="decay the learning rate to zero within this call")
    add("--corpus", type=Path, action="append", help="Python sources instead of this machine's")
    add("--take-up", type=Path, help="an exported model to go on from, if --work was lost")
    add("--no-compile", action="store_true", help="do not use torch.compile")
    add("--smoke", action="store_true", help="try every part on a processor in a minute or two")
    return parser.parse_args(arguments)


def call(sizes: Sizes, roots: list[Path], options: argparse.Namespace, began: float) -> None:
    """Prepare, train until the time is over, save, export."""
    from teacher_training import export, save_state

    run = set_up(sizes, roots, options, began)
    deadline = began + 60 * options.minutes - sizes.finish_seconds
    train(run, deadline, finish=options.finish)
    save_state(run.work, run.model, run.optimizer, run.progress)
    evaluate(run, final=options.finish)
    if options.out:
        export(options.out, run.model, run.tokenizer, run.log, SHARD_SIZE)
        print(f"wrote the model to {options.out}", flush=True)


def set_up(sizes: Sizes, roots: list[Path], options: argparse.Namespace, began: float) -> Run:
    """Make or take up corpus, recall rows, model and state."""
    shape = sizes.shape
    folder = options.work / "corpus"
    lost = options.take_up / "tokenizer.json" if options.take_up else None
    corpus = prepare(folder, roots, shape.vocabulary, SEED, tokenizer_file=lost)
    print(f"{time.monotonic() - began:.0f} s: corpus {asdict(corpus)}", flush=True)
    pool = make_pool(folder, sizes.recall_rows, shape.context + 1, SEED, workers=max(1, _cores() - 1))
    print(f"{time.monotonic() - began:.0f} s: recall rows {pool.shape}", flush=True)
    run = _assemble(sizes, folder, pool, options)
    log_start(run, corpus, pool)
    print(f"{time.monotonic() - began:.0f} s: ready at step {run.progress.step}", flush=True)
    return run


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _assemble(sizes: Sizes, folder: Path, pool: np.ndarray, options: argparse.Namespace) -> Run:
    import torch
    from teacher_evaluation import recall_rows
    from teacher_training import (
        Batches,
        Schedule,
        build_model,
        build_optimizer,
        fall_back_if_compile_fails,
        load_state,
        next_token_loss,
        take_up_export,
    )

    shape = sizes.shape
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    precision = partial(torch.autocast, device.type, dtype=torch.bfloat16)
    tokenizer = wrap_tokenizer(folder / "tokenizer.json", shape.context)
    model = build_model(shape, tokenizer, SEED)
    torch.nn.Module.to(model, device)
    optimizer = build_optimizer(model, Schedule().peak, fused=device.type == "cuda")
    log = options.work / "training_log.jsonl"
    progress = load_state(options.work, model, optimizer)
    if progress.step == 0 and options.take_up:
        progress = take_up_export(options.take_up, model, log)
    code = PackedTokens(np.load(folder / "train.npy", mmap_mode="r"))
    batches = Batches(code, pool, shape.batch_rows, SEED)
    held_out = PackedTokens(np.load(folder / "held_out.npy")).batch(
        0, 0, sizes.held_out_rows, shape.context + 1, SEED
    )
    with precision():
        loss = fall_back_if_compile_fails(
            next_token_loss, model, batches(progress.step).to(device), not options.no_compile
        )
    return Run(
        sizes=sizes,
        work=options.work,
        model=model,
        optimizer=optimizer,
        loss=loss,
        precision=precision,
        batches=batches,
        held_out=torch.from_numpy(held_out).to(device),
        tokenizer=tokenizer,
        recall=recall_rows(tokenizer, sizes.recall_examples, shape.context, SEED),
        progress=progress,
        log=log,
    )


def log_start(run: Run, corpus: Corpus, pool: np.ndarray) -> None:
    """Log what this call starts from."""
    from teacher_training import Schedule

    run.progress.calls += 1
    append_json_line(
        run.log,
        {
            "event": "start",
            **vars(run.progress),
            "parameters": sum(p.numel() for p in run.model.parameters()),
            "shape": asdict(run.sizes.shape),
            "schedule": asdict(Schedule()),
            "corpus": asdict(corpus),
            "recall_pool": list(pool.shape),
            "seed": SEED,
            "provenance": provenance(),
        },
    )


def train(run: Run, deadline: float, finish: bool) -> None:
    """Take steps until ``deadline`` (monotonic seconds)."""
    from teacher_training import Schedule, save_state

    began, before = time.monotonic(), run.progress.seconds
    total = before + deadline - began if finish else None
    rows = prepare_rows(run)
    reported = evaluated = began
    reported_tokens = run.progress.tokens
    while (now := time.monotonic()) < deadline:
        run.progress.seconds = before + now - began
        rate = Schedule().rate(run.progress, total)
        rows = step(run, rows, rate)
        if now - reported > run.sizes.report_seconds:
            speed = (run.progress.tokens - reported_tokens) / (now - reported)
            report(run, rate, speed, deadline - now)
            reported, reported_tokens = now, run.progress.tokens
        if now - evaluated > run.sizes.evaluate_seconds:
            evaluate(run)
            save_state(run.work, run.model, run.optimizer, run.progress)
            evaluated = reported = time.monotonic()
            reported_tokens = run.progress.tokens


def step(run: Run, rows: torch.Tensor, rate: float) -> torch.Tensor:
    """One optimiser step on ``rows``; prepares and returns the rows of the next while the device works."""
    import torch

    device = run.model.device
    with run.precision():
        loss = run.loss(run.model, rows.to(device, non_blocking=True))
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    following = prepare_rows(run, ahead=1)
    if bool(torch.isfinite(norm)):
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        run.last_loss = loss.item()
    else:
        run.progress.skipped_steps += 1
    run.optimizer.zero_grad(set_to_none=True)
    run.progress.step += 1
    run.progress.tokens += rows.shape[0] * (rows.shape[1] - 1)
    return following


def prepare_rows(run: Run, ahead: int = 0) -> torch.Tensor:
    """The rows of a coming step, in memory that the device can read from on its own."""
    rows = run.batches(run.progress.step + ahead)
    return rows.pin_memory() if run.model.device.type == "cuda" else rows


def report(run: Run, rate: float, speed: float, left: float) -> None:
    """Print and log one line of progress."""
    progress = run.progress
    print(
        f"step {progress.step}  loss {run.last_loss:.4f}  lr {rate:.2e}  {speed / 1e6:.2f}M tokens/s  "
        f"{left / 60:.1f} min left in this call",
        flush=True,
    )
    row = {"event": "step", **vars(progress), "loss": run.last_loss, "rate": rate, "tokens_per_second": speed}
    append_json_line(run.log, row)


def evaluate(run: Run, final: bool = False) -> None:
    """Measure held-out loss and recall accuracy; print and log them."""
    from teacher_evaluation import held_out_loss, recall_accuracy, recall_rows

    sizes = run.sizes
    examples = run.recall
    if final:
        lengths = (300, 800, 1600, 2400, 3000, 5000)
        examples = recall_rows(
            run.tokenizer, sizes.final_recall_examples, sizes.shape.context, SEED + 1, lengths
        )
    loss = held_out_loss(run.model, run.held_out, run.precision)
    recall = recall_accuracy(run.model, examples, run.precision)
    print(f"step {run.progress.step}  held-out loss {loss:.4f}  recall {recall}", flush=True)
    event = "final" if final else "evaluation"
    append_json_line(run.log, {"event": event, **vars(run.progress), "held_out_loss": loss, "recall": recall})


if __name__ == "__main__":
    sys.exit(main())
