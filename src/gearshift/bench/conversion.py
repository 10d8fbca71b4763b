"""Memory and time of ``gearshift convert``, beside a plain copy of what it writes.

    python -m gearshift.bench.conversion --out benchmarks/conversion.json

A random teacher of the shape is made on the spot. Then three things take turns, A B C, C B A: a conversion,
which reads the teacher and writes the supernet; a copy, which reads that supernet and writes it again; and
the conversion's own traffic without its work, which reads the teacher and writes it, over and over, until as
many bytes are written. Both copies use blocks of the size that the conversion uses. Before each turn all that
was written is waited for (sync) and the files are dropped from the page cache, so that everything is read
from the disk; each ends when its files are on the disk (fsync). No turn is left out of the figures, and a
command's start is part of its time.

Commands run as processes of their own, whose peak of resident memory the kernel tells (wait4). Linux starts a
child's peak at its parent's, which therefore must stay below: nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.errors import GearshiftError
from gearshift.files import refuse_existing, write_json
from gearshift.memory import peak_resident_memory
from gearshift.placement import Placement
from gearshift.presets import Preset, write_presets
from gearshift.provenance import provenance

RSS_BAR = 3 * 10**9
SPEED_BAR = 0.5
# As in gearshift.supernet.tensor_files, which would import torch.
BLOCK_BYTES = 1 << 18
TEACHER_SHARD_BYTES = 5 * 10**9
WEIGHTS = "*.safetensors"
# What is printed of a row.
SHOWN = ("metric", "value", "least", "most", "baseline", "ratio", "passes")

Row = dict[str, Any]


class ConversionBenchError(GearshiftError):
    """The measurement cannot be made here."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama with tied embeddings.

    Attributes:
        layers: decoder layers.
        hidden: hidden size.
        ffn: inner size of the FFNs.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: channels of a head.
        vocab: tokens of the vocabulary.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SHAPES = {
    "llama-3b": Shape(layers=28, hidden=3072, ffn=8192, heads=24, kv_heads=8, head_dim=128, vocab=128_256),
    "llama-1b": Shape(layers=16, hidden=2048, ffn=8192, heads=32, kv_heads=8, head_dim=64, vocab=128_256),
    "tiny": Shape(layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocab=61),
}


def teacher_config(shape: Shape) -> dict[str, Any]:
    """``config.json`` of the teacher, with the rope scaling of Llama 3.2."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


def teacher_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of the teacher's tensors."""
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (shape.ffn, hidden),
        "mlp.up_proj": (shape.ffn, hidden),
        "mlp.down_proj": (hidden, shape.ffn),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, hidden)}
    for number in range(shape.layers):
        shapes |= {f"model.layers.{number}.{name}.weight": size for name, size in layer.items()}
    return shapes | {"model.norm.weight": (hidden,)}


def make_teacher(directory: Path, shape: Shape, seed: int, shard_bytes: int = TEACHER_SHARD_BYTES) -> None:
    """Write a random teacher in bfloat16; one tensor at a time is in memory."""
    import torch

    from gearshift.supernet.shards import ShardWriter
    from gearshift.tensor_headers import TensorInfo

    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    infos = {name: TensorInfo(size, "BF16") for name, size in teacher_shapes(shape).items()}
    with ShardWriter(directory, infos, shard_bytes) as writer:
        for name, info in infos.items():
            mean, spread = (1.0, 0.1) if name.endswith("norm.weight") else (0.0, 0.02)
            tensor = torch.empty(info.shape, dtype=torch.bfloat16)
            writer.write(name, tensor.normal_(mean, spread, generator=generator))
    write_json(directory / "config.json", teacher_config(shape))


def planned_memory(teacher: Path) -> int:
    """Bytes that the plan promises to need at most, beside the program."""
    from gearshift.convert.convert import plan_conversion

    return plan_conversion(teacher).memory


def in_other_process(function: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401 - what it returns
    """What the function returns, without any of its memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


@dataclass(frozen=True)
class Turn:
    """One command or one copy.

    Attributes:
        seconds: until its files are on the disk.
        sync_seconds: the part of them after its end, waiting for the disk.
        nbytes: bytes of the weights that it wrote.
        peak: bytes of resident memory at most; 0 for a copy.
    """

    seconds: float
    sync_seconds: float
    nbytes: int
    peak: int = 0

    @property
    def speed(self) -> float:
        """Bytes written a second."""
        return self.nbytes / self.seconds


def run_command(*arguments: str | Path, out: Path | None = None) -> Turn:
    """Run a ``gearshift`` command that writes ``out``, if it writes anything, and wait for the disk.

    Raises:
        ConversionBenchError: it failed, or this process is too large to measure it.
    """
    command = [sys.executable, "-m", "gearshift", *map(str, arguments)]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ConversionBenchError(f"'gearshift {' '.join(command[3:])}' failed; see above")
    if usage.ru_maxrss * 1024 <= peak_resident_memory():
        raise ConversionBenchError("this process held more memory than its child; measure from a fresh one")
    return _ended(began, out, usage.ru_maxrss * 1024)


def copy_weights(source: Path, out: Path, nbytes: int) -> Turn:
    """Copy so many bytes of weight files, block by block; behind the last comes the first again."""
    block, left = memoryview(bytearray(BLOCK_BYTES)), nbytes
    paths = itertools.cycle(sorted(source.glob(WEIGHTS)))
    began = time.perf_counter()
    out.mkdir()
    for number in itertools.count():
        if not left:
            return _ended(began, out)
        name = f"{number:05}.safetensors"
        with next(paths).open("rb", buffering=0) as given, (out / name).open("wb", buffering=0) as copied:
            while count := given.readinto(block[:left]):
                copied.write(block[:count])
                left -= count
    raise AssertionError


def _ended(began: float, out: Path | None, peak: int = 0) -> Turn:
    """Wait until what was written is on the disk, and stop the clock."""
    written = time.perf_counter()
    for path in files_of(out):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    now = time.perf_counter()
    return Turn(now - began, now - written, weight_bytes(out), peak)


def weight_bytes(directory: Path | None) -> int:
    """Bytes of the weight files of a model directory."""
    return 0 if directory is None else sum(path.stat().st_size for path in directory.glob(WEIGHTS))


def files_of(directory: Path | None) -> list[Path]:
    """The files directly in a directory, and those of its directories."""
    return [] if directory is None else sorted(path for path in directory.rglob("*") if path.is_file())


def settle(work: Path) -> None:
    """Let the disk come to rest, and forget what was read from it."""
    os.sync()
    for path in files_of(work):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Bench:
    """The measurements, in a working directory.

    Attributes:
        work: the directory; it holds a teacher, its supernet and another directory of that size at most.
        shape: the teacher's.
        rounds: how many times each command, and each copy, has its turn.
    """

    work: Path
    shape: Shape
    rounds: int

    def rows(self) -> Iterator[Row]:
        """Make the teacher, then one row after another."""
        in_other_process(make_teacher, self._teacher, self.shape, 0)
        dry = [self._turn("convert", self._teacher, None, "--dry-run") for _ in range(self.rounds)]
        converted, copied, streamed = self._take_turns()
        program = statistics.median(turn.peak for turn in dry)
        yield from self._memory_rows([turn.peak for turn in converted], program)
        yield speed_row("convert_bytes_per_second", converted, copied, SPEED_BAR)
        yield speed_row("convert_beside_its_own_traffic", converted, streamed)
        yield spread("dry_run_seconds", [turn.seconds for turn in dry])
        yield from self._other_commands(copied)

    @property
    def _teacher(self) -> Path:
        return self.work / "teacher"

    @property
    def _supernet(self) -> Path:
        return self.work / "supernet"

    def _turn(self, command: str, source: Path, out: Path | None, *options: str) -> Turn:
        """A command on a rested disk; what an earlier turn left at ``out`` is removed before."""
        if out is not None:
            shutil.rmtree(out, ignore_errors=True)
        settle(self.work)
        return run_command(command, source, out or self.work / "never", *options, out=out)

    def _copy(self, source: Path) -> Turn:
        """As many bytes as the supernet has."""
        settle(self.work)
        turn = copy_weights(source, self.work / "copy", weight_bytes(self._supernet))
        shutil.rmtree(self.work / "copy")
        return turn

    def _take_turns(self) -> tuple[list[Turn], list[Turn], list[Turn]]:
        """Conversions, copies of the latest supernet, and their traffic; every second round backwards."""
        kinds: list[tuple[list[Turn], Callable[[], Turn]]] = [
            ([], lambda: self._turn("convert", self._teacher, self._supernet)),
            ([], lambda: self._copy(self._supernet)),
            ([], lambda: self._copy(self._teacher)),
        ]
        for number in range(self.rounds):
            for turns, take in kinds if number % 2 == 0 else reversed(kinds):
                turns.append(take())
                print(f"round {number}: {turns[-1].speed / 1e6:.0f} MB/s, {turns[-1]}", flush=True)
        (converted, _), (copied, _), (streamed, _) = kinds
        return converted, copied, streamed

    def _memory_rows(self, peaks: Sequence[int], program: float) -> Iterator[Row]:
        """Peak memory against the bar, and what the plan says of it against what the program did not hold."""
        peak, planned = max(peaks), in_other_process(planned_memory, self._teacher)
        row = spread("convert_peak_bytes", peaks) | {"baseline": program, "ratio": peak / program}
        yield row | {"bar": RSS_BAR, "passes": peak < RSS_BAR}
        measured = peak - program
        row = {"metric": "planned_memory_bytes", "value": planned, "baseline": measured}
        yield row | {"ratio": planned / measured, "bar": 1.0, "passes": planned >= measured}

    def _other_commands(self, copied: Sequence[Turn]) -> Iterator[Row]:
        """The teacher out of the supernet again, and a supernet without what a preset does not use."""
        layers, out = self.shape.layers, self.work / "out"
        half = Placement.parse(f"fa*{layers // 2} gdn*{layers - layers // 2}")
        write_presets(self._supernet, [Preset("half", half)])
        for command, *options in (("export", "--placement", f"fa*{layers}"), ("thin", "--presets", "half")):
            turns = [self._turn(command, self._supernet, out, *options) for _ in range(self.rounds)]
            yield speed_row(f"{command}_bytes_per_second", turns, copied)
            yield spread(f"{command}_peak_bytes", [turn.peak for turn in turns])


def spread(metric: str, values: Sequence[float]) -> Row:
    """A row: the median of all values, and each of them; of peaks of memory the greatest counts."""
    value = max(values) if metric.endswith("peak_bytes") else statistics.median(values)
    return {"metric": metric, "value": value, "least": min(values), "most": max(values), "each": list(values)}


def speed_row(metric: str, turns: Sequence[Turn], copied: Sequence[Turn], bar: float | None = None) -> Row:
    """Bytes written a second, of a command and of copies; the ratio is that of the medians."""
    row = spread(metric, [turn.speed for turn in turns])
    baselines = [turn.speed for turn in copied]
    ratio = row["value"] / statistics.median(baselines)
    row |= {
        "baseline": statistics.median(baselines),
        "baseline_each": baselines,
        "ratio": ratio,
        "ratio_each": [turn.speed / copy for turn, copy in zip(turns, baselines, strict=True)],
        "nbytes": turns[0].nbytes,
        "seconds": statistics.median(turn.seconds for turn in turns),
        "sync_seconds": [turn.sync_seconds for turn in turns],
        "baseline_sync_seconds": [turn.sync_seconds for turn in copied],
    }
    return row | ({} if bar is None else {"bar": bar, "passes": ratio >= bar})


def main() -> None:
    """Measure, print a line for each row, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3b", help="the teacher's sizes")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each kind")
    parser.add_argument("--work", type=Path, default=Path("runs/conversion"), help="removed at the end")
    arguments = parser.parse_args()
    if not hasattr(os, "posix_fadvise"):
        raise ConversionBenchError("this measurement needs Linux, to drop files from the page cache")
    refuse_existing(arguments.work)
    rows = []
    try:
        for row in Bench(arguments.work, SHAPES[arguments.shape], arguments.rounds).rows():
            rows.append(row)
            print(
                row["metric"],
                row["value"],
                *(f"{key} {row[key]}" for key in ("ratio", "passes") if key in row),
            )
            write_json(arguments.out, {"provenance": provenance(), "shape": arguments.shape, "rows": rows})
    finally:
        shutil.rmtree(arguments.work, ignore_errors=True)


if __name__ == "__main__":
    main()
