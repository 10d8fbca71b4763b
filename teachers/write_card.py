"""Write the teacher's model card and loss curve from its training log and configuration.

    PYTHONPATH=src python3 teachers/write_card.py teachers/python-11m --commit 3a43178

The words are in ``card_template.md``; the numbers come from the log. ``--commit`` names the version of the
scripts that trained, for logs of machines that had no git.
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

from gearshift.errors import GearshiftError
from gearshift.files import atomic_file, read_json, read_json_lines

Row = dict[str, Any]

TEMPLATE = Path(__file__).parent / "card_template.md"
WORK = "teacher-work"


class CardError(GearshiftError):
    """The training log is not that of a finished training, or the commit is unknown."""


@dataclass(frozen=True)
class Log:
    """The rows of a training log by their event, in the order of the training."""

    starts: list[Row]
    steps: list[Row]
    evaluations: list[Row]
    final: Row

    @classmethod
    def read(cls, path: Path) -> Log:
        """Read a log.

        Raises:
            CardError: the log does not end with the evaluation of a finished training.
        """
        rows = read_json_lines(path)
        if not rows or rows[-1]["event"] != "final":
            raise CardError(
                f"{path} does not end with a final evaluation; finish the training (--finish) first"
            )
        events = {
            name: [row for row in rows if row["event"] == name] for name in ("start", "step", "evaluation")
        }
        return cls(events["start"], events["step"], [*events["evaluation"], rows[-1]], rows[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Write README.md and loss_curve.png into the teacher's folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the teacher: config.json and training_log.jsonl")
    parser.add_argument("--commit", required=True, help="the version of the scripts that trained it")
    options = parser.parse_args(arguments)
    log = Log.read(options.folder / "training_log.jsonl")
    config = read_json(options.folder / "config.json")
    card = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        **facts(log, config, options.folder),
        architecture=architecture(config, log),
        data=data(log),
        training=training(log),
        calls=calls(log),
        commit=commit_note(log, options.commit),
        losses=losses(log),
        recall=recall(log.final["recall"]),
        commands=commands(log, options.folder),
    )
    with atomic_file(options.folder / "README.md") as partial:
        partial.write_text(card, encoding="utf-8")
    draw(log, options.folder / "loss_curve.png")


def facts(log: Log, config: Row, folder: Path) -> dict[str, str]:
    """The single numbers and names within the text."""
    start, loss = log.starts[0], log.final["held_out_loss"]
    corpus, made_with = start["corpus"], start["provenance"]
    tokens = corpus["train_tokens"] + corpus["held_out_tokens"]
    return {
        "name": f"{folder.resolve().name}, a small teacher for Gearshift",
        "folder": folder.as_posix(),
        "type": config["model_type"].capitalize(),
        "parameters": f"{start['parameters'] / 1e6:.1f} M",
        "minutes": f"{log.final['seconds'] / 60:.0f}",
        "hardware": made_with["hardware"],
        "python": ".".join(made_with["python"].split(".")[:2]),
        "context": f"{config['max_position_embeddings']:,}",
        "final_loss": f"{loss:.3f}",
        "perplexity": f"{math.exp(loss):.2f}",
        "bits": f"{loss / math.log(2) * tokens / corpus['characters']:.2f}",
    }


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; every column but the first is aligned right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, rule, *rows))


def architecture(config: Row, log: Log) -> str:
    """The table of the model's shape."""
    rows = [
        ("parameters", f"{log.starts[0]['parameters']:,}"),
        ("layers", config["num_hidden_layers"]),
        ("hidden size", config["hidden_size"]),
        (
            "attention heads (key-value heads)",
            f"{config['num_attention_heads']} ({config['num_key_value_heads']})",
        ),
        ("head size", config["head_dim"]),
        ("MLP", f"{config['intermediate_size']}, gated {config['hidden_act']}"),
        ("positions", f"rotary, base {config['rope_parameters']['rope_theta']:,.0f}"),
        ("context", f"{config['max_position_embeddings']:,} tokens"),
        ("vocabulary", f"{config['vocab_size']:,}"),
        ("embeddings", "shared with the output" if config["tie_word_embeddings"] else "own for the output"),
        ("stored as", config["dtype"]),
    ]
    return table(("part", "value"), rows)


def data(log: Log) -> str:
    """The table of the corpus."""
    corpus = log.starts[0]["corpus"]
    rows = [
        ("files to train on", f"{corpus['train_files']:,}"),
        ("files held out", f"{corpus['held_out_files']:,}"),
        ("characters, both together", f"{corpus['characters'] / 1e6:.1f} M"),
        ("tokens to train on", f"{corpus['train_tokens'] / 1e6:.1f} M"),
        ("tokens held out", f"{corpus['held_out_tokens'] / 1e6:.1f} M"),
    ]
    return table(("part", "count"), rows)


def training(log: Log) -> str:
    """The table of the training."""
    start, final = log.starts[0], log.final
    shape, schedule, made_with = start["shape"], start["schedule"], start["provenance"]
    share = f"the last {schedule['decay_share']:.0%} of the training time"
    rows = [
        ("steps", f"{final['step']:,}, of which {final['skipped_steps']} skipped"),
        (
            "batch",
            f"{shape['batch_rows']} × {shape['context']:,} = {final['tokens'] // final['step']:,} tokens",
        ),
        ("tokens seen", f"{final['tokens'] / 1e9:.2f} B"),
        ("optimiser", "AdamW, betas 0.9 and 0.95, weight decay 0.1 on matrices, gradients clipped at norm 1"),
        (
            "learning rate",
            f"{schedule['peak']:g}; warm-up {schedule['warmup_steps']} steps; linear decay in {share}",
        ),
        ("precision", "bfloat16 autocast, float32 weights"),
        ("time", f"{final['seconds']:.0f} s with evaluations, without preparing the data"),
        ("speed", f"{median(row['tokens_per_second'] for row in log.steps) / 1e6:.2f} M tokens/s (median)"),
        ("hardware", f"one {made_with['hardware']}"),
        ("software", f"torch {made_with['torch']}, transformers {made_with['transformers']}"),
        ("seed", start["seed"]),
    ]
    return table(("part", "value"), rows)


def calls(log: Log) -> str:
    """The table of the calls that the training took."""
    ends = [*(row["step"] for row in log.starts[1:]), log.final["step"]]
    rows = [
        (row["calls"], row["provenance"]["date"], f"{row['step']:,} to {end:,}")
        for row, end in zip(log.starts, ends, strict=True)
    ]
    return table(("call", "ready at", "steps"), rows)


def commit_note(log: Log, commit: str) -> str:
    """Which version of the scripts trained, and which calls began before that version was committed.

    Raises:
        CardError: git does not know the commit.
    """
    shown = subprocess.run(
        ["git", "show", "-s", "--format=%h %cI", commit],
        cwd=TEMPLATE.parent,
        capture_output=True,
        text=True,
    )
    if shown.returncode:
        raise CardError(f"--commit {commit}: git knows no such commit here; give one of 'git log teachers'")
    name, date = shown.stdout.split()
    made = datetime.fromisoformat(date)
    early = [row["calls"] for row in log.starts if datetime.fromisoformat(row["provenance"]["date"]) < made]
    note = f"Scripts: commit `{name}` of {date}."
    if early:
        which = " and ".join(map(str, early))
        note += (
            f" Call {which} began before that commit was made, from an uncommitted state on the way to it."
        )
    return note


def losses(log: Log) -> str:
    """The table of held-out loss, with the training loss of the nearest reported step."""
    rows = []
    for row in log.evaluations:
        near = min(log.steps, key=lambda step: abs(step["step"] - row["step"]))
        numbers = f"{near['loss']:.3f}", f"{row['held_out_loss']:.3f}"
        rows.append((f"{row['step']:,}", f"{row['tokens'] / 1e6:,.0f}", f"{row['seconds']:.0f}", *numbers))
    return table(("step", "M tokens", "seconds", "training loss", "held-out loss"), rows)


def recall(accuracy: dict[str, float]) -> str:
    """The table of accuracies, keyed ``task@characters``: a row for each task, a column for each length."""
    cells = [cell.split("@") for cell in accuracy]
    tasks = sorted({task for task, _ in cells})
    lengths = sorted({int(length) for _, length in cells})

    def shown(cell: str) -> str:
        return f"{accuracy[cell]:.1%}" if cell in accuracy else "–"

    rows = [(task, *(shown(f"{task}@{length}") for length in lengths)) for task in tasks]
    return table(("task", *(f"{length:,} characters" for length in lengths)), rows)


def commands(log: Log, folder: Path) -> str:
    """The commands of every call and of the card, with folders of the reader's own machine."""
    lines = []
    for row in log.starts:
        words = shlex.split(row["provenance"]["command"])
        for option, value in (("--work", WORK), ("--out", folder.as_posix())):
            if option in words:
                words[words.index(option) + 1] = value
        lines.append(f"PYTHONPATH=src python3 teachers/{shlex.join(words)}")
    lines.append(f"PYTHONPATH=src python3 teachers/write_card.py {folder.as_posix()} --commit HEAD")
    return "\n".join(lines)


def draw(log: Log, path: Path) -> None:
    """Draw training and held-out loss against the tokens seen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.8), dpi=110, layout="constrained")
    axes = figure.subplots()
    for rows, key, label, color, marker in (
        (log.steps, "loss", "training batch (a quarter recall tasks)", "#999999", ""),
        (log.evaluations, "held_out_loss", "held-out code", "#0072B2", "o"),
    ):
        tokens = [row["tokens"] / 1e6 for row in rows]
        axes.plot(tokens, [row[key] for row in rows], label=label, color=color, marker=marker)
    axes.set(xlabel="tokens seen (millions)", ylabel="loss (nats a token)", xlim=0, ylim=(1, 4))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with atomic_file(path) as partial:
        # No date and no version in the file: the same log gives the same picture.
        figure.savefig(partial, format="png", metadata={"Software": None})


if __name__ == "__main__":
    try:
        main()
    except GearshiftError as error:
        sys.exit(f"error: {error}")
