"""Decoding in vLLM: presets of one supernet, and vLLM's own model of the teacher's shape beside them.

    python -m gearshift.bench.serving supernet --work runs/serving
    python -m gearshift.bench.serving stock --work runs/serving
    python -m gearshift.bench.serving report --work runs/serving --out benchmarks/serving.json

Weights are random, and caches are filled with random numbers instead of prompts: a decode step costs the
same. Each of the first two commands starts one engine and appends a row for each measurement; run them one
after the other on the same GPU. The floor of a step is the larger of the bytes that it must read and write
over the copy bandwidth, and of its operations over the rate of matrix products.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gearshift.bench.serving_shapes import COUNTS, ServedShape, floor_seconds
from gearshift.errors import GearshiftError
from gearshift.files import append_json_line, read_json_lines, write_json
from gearshift.placement import Placement
from gearshift.provenance import provenance

# Tokens that every request decodes before the clock starts, and while it runs.
WARM_TOKENS, TIMED_TOKENS = 12, 48
ROUNDS = 3
# Context lengths and batches at which all-FA and the stock model are compared as they are.
FIXED = ((32_768, 12), (4096, 64))

COMMON_OPTIONS = {"load_format": "dummy", "skip_tokenizer_init": True, "enable_prefix_caching": False}

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: a preset's.
        placement: its placement; None for the stock model.
        context: cached tokens of each request.
        batch: requests; 0 for as many as fit.
    """

    name: str
    placement: Placement | None
    context: int
    batch: int


def cases(shape: ServedShape, contexts: Sequence[int]) -> list[Case]:
    """All presets with as many requests as fit, and all-FA at the batches of the stock model."""
    fixed = [Case("all-fa", shape.all_attention, context, batch) for context, batch in FIXED]
    fitting = [
        Case(name, placement, context, 0) for context in contexts for name, placement in shape.presets.items()
    ]
    return [case for case in (*fixed, *fitting) if case.context <= max(contexts)]


def stock_cases(contexts: Sequence[int]) -> list[Case]:
    """The stock model at fixed batches, and with as many requests as fit."""
    fixed = [Case("stock", None, context, batch) for context, batch in FIXED]
    fitting = [Case("stock", None, context, 0) for context in contexts]
    return [case for case in (*fixed, *fitting) if case.context <= max(contexts)]


class Engine:
    """A vLLM engine whose requests decode without having been prefilled.

    Args:
        llm: a ``vllm.LLM``.
        vocabulary: tokens that prompts are drawn from.
    """

    def __init__(self, llm: Any, vocabulary: int) -> None:  # noqa: ANN401 - vLLM may not be installed
        self.llm, self.vocabulary, self._count = llm, vocabulary, 0

    def seconds_per_step(self, case: Case, batch: int) -> list[float]:
        """Seconds of a decode step, `ROUNDS` times, while all requests run.

        Raises:
            GearshiftError: they do not all fit.
        """
        names = self._submit(case, batch)
        done = self._step_until(names, 1)
        if case.placement is not None:
            self.llm.collective_rpc("fill_cache", args=(self._count,))
        done = self._step_until(names, WARM_TOKENS, done)
        times = []
        for number in range(ROUNDS):
            begun = time.perf_counter()
            done = self._step_until(names, WARM_TOKENS + (number + 1) * TIMED_TOKENS // ROUNDS, done)
            times.append((time.perf_counter() - begun) * ROUNDS / TIMED_TOKENS)
        self._clear(names)
        return times

    def _submit(self, case: Case, batch: int) -> list[str]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        extra = None if case.placement is None else {"placement": str(case.placement)}
        params = SamplingParams(
            max_tokens=WARM_TOKENS + TIMED_TOKENS + 8,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra,
        )
        generator = torch.Generator().manual_seed(self._count)
        names = []
        for _ in range(batch):
            self._count += 1
            names.append(f"request-{self._count}")
            tokens = torch.randint(1, self.vocabulary, (case.context,), generator=generator)
            prompt = TokensPrompt(prompt_token_ids=tokens.tolist())
            self.llm.llm_engine.add_request(names[-1], prompt, params)
        return names

    def _step_until(
        self, names: list[str], tokens: int, done: dict[str, int] | None = None
    ) -> dict[str, int]:
        """Step until every request has so many tokens; returns how many each has."""
        done = dict.fromkeys(names, 0) if done is None else done
        left = sum(count < tokens for count in done.values())
        for _ in range(40 * tokens + 10 * len(names)):
            if left == 0:
                return done
            for output in self.llm.llm_engine.step():
                before = done[output.request_id]
                done[output.request_id] += len(output.outputs[0].token_ids)
                left -= before < tokens <= done[output.request_id]
        raise GearshiftError(f"{left} of {len(names)} requests do not run: the cache has no room for them")

    def _clear(self, names: list[str]) -> None:
        engine = self.llm.llm_engine
        engine.abort_request(names)
        while engine.has_unfinished_requests():
            engine.step()


def supernet_engine(shape: ServedShape, directory: Path, options: dict[str, Any]) -> Engine:
    """An engine of the supernet, with random weights."""
    from vllm import LLM

    own: dict[str, Any] = {
        **COMMON_OPTIONS,
        "additional_config": {"gearshift": {"pretend_prefilled": True}},
    }
    return Engine(LLM(model=str(shape.write_supernet(directory)), **(own | options)), shape.shape.vocabulary)


def stock_engine(shape: ServedShape, directory: Path, options: dict[str, Any]) -> Engine:
    """An engine of vLLM's own model of the same shape, with random weights."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    filled = KVTransferConfig(
        kv_connector="DecodeBenchConnector",
        kv_role="kv_both",
        kv_connector_extra_config={"fill_mean": 0.0, "fill_std": 0.1},
    )
    own: dict[str, Any] = {**COMMON_OPTIONS, "kv_transfer_config": filled}
    return Engine(LLM(model=str(shape.write_teacher(directory)), **(own | options)), shape.shape.vocabulary)


def batch_that_fits(engine: Engine, case: Case, most: int) -> int:
    """Requests of a case that fit into the cache, with the tokens that they will decode."""
    config = engine.llm.llm_engine.vllm_config
    tokens = case.context + WARM_TOKENS + TIMED_TOKENS + 16
    blocks = config.cache_config.num_gpu_blocks - 1
    if case.placement is None:
        needed = -(-tokens // config.cache_config.block_size)
    else:
        from gearshift.serve.vllm.geometry import layer_kinds
        from gearshift.serve.vllm.model import slot_layout
        from gearshift.slot_layout import Kind

        supernet = config.model_config.hf_config
        layout, kinds = slot_layout(config, supernet), layer_kinds(supernet)
        own: list[Kind] = [kinds[layer][mixer] for layer, mixer in enumerate(case.placement)]
        needed = sum(layout.blocks(kind, own.count(kind), tokens, 2) for kind in set(own))
    # vLLM keeps a hundredth free when it lets requests in.
    return min(most, int(blocks * 0.985) // needed)


def measure(
    engine: Engine, chosen: Sequence[Case], shape: ServedShape, out: Path, started: float, most: int
) -> None:
    """Append a row for each case; a case that fails is said and left out."""
    description = shape.engine()
    for case in chosen:
        batch = case.batch or batch_that_fits(engine, case, most)
        try:
            times = engine.seconds_per_step(case, batch)
        except GearshiftError as error:
            print(f"{case.name} at {case.context} x {batch}: {error}", flush=True)
            continue
        best = sorted(times)[len(times) // 2]
        row = {
            "name": case.name,
            "placement": None if case.placement is None else str(case.placement),
            "context_length": case.context,
            "batch_size": batch,
            "as_many_as_fit": case.batch == 0,
            "seconds_per_step": best,
            "each": times,
            "tokens_per_second": batch / best,
            "floor_seconds": floor_seconds(
                shape.shape, description, case.placement or shape.all_attention, case.context, batch
            ),
            "cache_blocks": engine.llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
            "startup_seconds": started,
            "provenance": provenance(),
        }
        append_json_line(out, row)
        print(
            f"{case.name} {case.context} x {batch}: {1e3 * best:.2f} ms a step, {batch / best:.0f} tokens/s, "
            f"{row['floor_seconds'] / best:.2f} of the floor",
            flush=True,
        )


def report(rows: Sequence[Row]) -> list[Row]:
    """Speeds of the presets over the stock model's in the same run, by metric."""
    stock = {
        (r["context_length"], r["batch_size"] if not r["as_many_as_fit"] else 0): r
        for r in rows
        if r["placement"] is None
    }
    found = []
    for row in rows:
        if row["placement"] is None:
            continue
        fits, context = row["as_many_as_fit"], row["context_length"]
        base = stock.get((context, 0 if fits else row["batch_size"]))
        if base is None:
            continue
        size = f"{context // 1024}k"
        metric = f"speedup_{size}_{row['name']}" if fits else f"allfa_vs_stock_{size}_b{row['batch_size']}"
        value, baseline = row["tokens_per_second"], base["tokens_per_second"]
        found.append(
            {
                "metric": metric,
                "value": value,
                "baseline": baseline,
                "ratio": value / baseline,
                "floor_fraction": row["floor_seconds"] / row["seconds_per_step"],
            }
        )
    return found


def cost_rows(shape: ServedShape, measurements: Sequence[Row]) -> list[Row]:
    """The supernet's measurements as ``gearshift cost fit`` reads them."""
    engine = shape.engine().to_json()
    return [
        {
            "placement": row["placement"],
            "context_length": row["context_length"],
            "batch_size": row["batch_size"],
            "seconds_per_step": row["seconds_per_step"],
            "seconds_least": min(row["each"]),
            "seconds_most": max(row["each"]),
            "prefill_seconds": None,
            "memory_bytes": None,
            "engine": engine,
            "hardware": row["provenance"]["hardware"],
            "provenance": row["provenance"],
        }
        for row in measurements
        if row["placement"] is not None
    ]


def main() -> None:
    """Measure one engine, or put the measurements together."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("supernet", "stock", "report"))
    parser.add_argument("--work", type=Path, required=True, help="folder for configs and rows")
    parser.add_argument("--out", type=Path, help="JSON file of the report")
    parser.add_argument("--cost", type=Path, help="JSON lines of the report for 'gearshift cost fit'")
    parser.add_argument("--shape", choices=COUNTS, default="apriel-15b")
    parser.add_argument("--contexts", default="32768,16384", help="cached tokens, comma-separated")
    parser.add_argument("--most", type=int, default=512, help="requests at once")
    parser.add_argument("--options", default="{}", help="further options of vllm.LLM, as JSON")
    given = parser.parse_args()
    rows = given.work / "rows.jsonl"
    if given.what == "report":
        found = read_json_lines(rows)
        if given.cost is not None:
            lines = cost_rows(ServedShape.named(given.shape), found)
            given.cost.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
        # Where it was measured, not where it was put together.
        write_json(
            given.out,
            {"provenance": found[-1]["provenance"], "rows": report(found), "measurements": found},
        )
        return
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    shape, contexts = ServedShape.named(given.shape), [int(context) for context in given.contexts.split(",")]
    options = {"max_model_len": max(contexts) + 512, "max_num_seqs": given.most, **json.loads(given.options)}
    begun = time.perf_counter()
    if given.what == "supernet":
        engine, chosen = supernet_engine(shape, given.work, options), cases(shape, contexts)
    else:
        engine, chosen = stock_engine(shape, given.work, options), stock_cases(contexts)
    measure(engine, chosen, shape, rows, time.perf_counter() - begun, given.most)


if __name__ == "__main__":
    main()
