"""The GPU's delta-rule kernels against the naive twins: errors of outputs and gradients, and speed.

    python -m gearshift.bench.delta_rules --out benchmarks/delta_rules.json

The reference is the naive chunked twin in float64 on the same bfloat16 inputs; the twin in float32 is timed
as the peer. The floor of a kernel's memory traffic is what it must read and write once, over the GPU's copy
bandwidth.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gearshift.errors import GearshiftError
from gearshift.files import write_json
from gearshift.provenance import provenance
from gearshift.supernet.ops.delta_rule import CHUNK_TOKENS, delta_rule, fla_kernels
from gearshift.supernet.ops.naive import chunk_delta_rule

NAMES = ("q", "k", "v", "g", "beta", "state")
ERROR_BAR = 1e-2


@dataclass(frozen=True)
class Case:
    """One shape to check.

    Attributes:
        per_channel: Kimi Delta Attention, else Gated DeltaNet.
        tokens: sequence length.
        heads: heads.
        head_dim: channels of keys and values.
        timed: measure its speed too.
    """

    per_channel: bool
    tokens: int
    heads: int
    head_dim: int
    timed: bool = False

    @property
    def mixer(self) -> str:
        """Short name of the mixer this case stands for."""
        return "kda" if self.per_channel else "gdn"


def cases() -> Iterator[Case]:
    """Lengths that are and are not multiples of a chunk, the shipped teacher's heads and the 15B shape's."""
    for per_channel, (heads, head_dim) in itertools.product((False, True), ((8, 64), (32, 128))):
        for tokens in (64, 1000, 4096):
            yield Case(per_channel, tokens, heads, head_dim, timed=tokens == 4096)


def random_inputs(case: Case, batch: int, seed: int) -> list[Tensor]:
    """Fresh q, k, v, g, beta and initial state in bfloat16 (g and state float32) on the GPU."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    head = (batch, case.tokens, case.heads)
    channels = (case.head_dim,) if case.per_channel else ()
    q, k, v = (normal(*head, case.head_dim).bfloat16() for _ in range(3))
    g = -torch.nn.functional.softplus(normal(*head, *channels) - 3)
    beta = normal(*head).sigmoid().bfloat16()
    state = normal(batch, case.heads, case.head_dim, case.head_dim) / 8
    return [q, k, v, g, beta, state]


def relative_error(given: Tensor, reference: Tensor) -> float:
    """||given - reference|| / ||reference||; NaN when anything given is NaN."""
    return float((given.double() - reference).norm() / reference.norm())


def outputs_and_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], dtype: torch.dtype | None, seed: int
) -> dict[str, Tensor]:
    """Output, last state and the gradient of every input for one random loss."""
    leaves = [(x if dtype is None else x.to(dtype)).clone().requires_grad_() for x in inputs]
    out, state = function(*leaves)
    generator = torch.Generator("cuda").manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator, device="cuda") for x in (out, state)]
    loss = sum((x * w.to(x.dtype)).sum() for x, w in zip((out, state), weights, strict=True))
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = {
        f"d{name}": leaf.grad for name, leaf in zip(NAMES, leaves, strict=True) if leaf.grad is not None
    }
    assert len(gradients) == len(NAMES)
    return {"out": out.detach(), "last_state": state.detach(), **gradients}


def poison_free_memory() -> None:
    """Fill the allocator's free blocks with NaN, so that an output element nobody wrote shows."""
    blocks = [torch.full((1 << 26,), float("nan"), device="cuda") for _ in range(8)]
    del blocks


def naive_twin(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The chunked naive twin at the length its dispatcher would use."""
    return chunk_delta_rule(q, k, v, g, beta, state, CHUNK_TOKENS)


def check_case(case: Case, seed: int) -> dict[str, Any]:
    """Errors of the kernel for one case, and its speed if asked for."""
    inputs = random_inputs(case, batch=2, seed=seed)
    reference = outputs_and_gradients(naive_twin, inputs, torch.float64, seed)
    poison_free_memory()
    given = outputs_and_gradients(delta_rule, inputs, None, seed)
    errors = {name: relative_error(given[name], reference[name]) for name in reference}
    row: dict[str, Any] = {
        "mixer": case.mixer,
        "tokens": case.tokens,
        "heads": case.heads,
        "head_dim": case.head_dim,
    }
    row["errors"] = errors
    # Not `max`: a NaN must fail.
    row["passes"] = all(error < ERROR_BAR for error in errors.values())
    if case.timed:
        row["milliseconds"] = time_case(case)
    return row


def time_case(case: Case) -> dict[str, Any]:
    """Median and spread of forward, and forward with backward, for the kernel and for the naive twin."""
    inputs = random_inputs(case, batch=4, seed=1)
    # One pass of reading q, k, v, g, beta and writing the output.
    moved = sum(x.nbytes for x in inputs[:5]) + inputs[2].nbytes
    result: dict[str, Any] = {"batch": 4, "bytes_moved": moved}
    for name, function in (("kernel", delta_rule), ("naive", naive_twin)):
        repeats = 20 if name == "kernel" else 5
        result[f"{name}_forward"] = time_function(lambda f=function: f(*inputs), repeats)
        result[f"{name}_forward_backward"] = time_function(
            lambda f=function: outputs_and_gradients(f, inputs, None, 2), repeats
        )
    return result


def time_function(function: Callable[[], object], repeats: int) -> dict[str, float]:
    """Milliseconds between CUDA events: median, least and most of ``repeats`` runs after two warm-up runs."""
    times = []
    for repeat in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end))
    return {"median": statistics.median(times), "least": min(times), "most": max(times)}


def main() -> None:
    """Check every case, print a line each, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or fla_kernels() is None:
        raise GearshiftError("this measurement needs a CUDA GPU and flash-linear-attention (extra 'gpu')")
    rows = []
    for case in cases():
        row = check_case(case, arguments.seed)
        rows.append(row)
        worst = max(row["errors"], key=row["errors"].get)
        shape = f"{case.mixer} {case.tokens} {case.heads} {case.head_dim}"
        print(shape, "worst", worst, row["errors"][worst], flush=True)
        write_json(arguments.out, {"provenance": provenance(), "error_bar": ERROR_BAR, "rows": rows})


if __name__ == "__main__":
    main()
