"""The measurements of decoding, on a tiny shape; without a GPU their figures mean nothing."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; tests/serve/vllm/rig says how")

from gearshift.bench.agreement import main as agreement
from gearshift.bench.serving import (
    batch_that_fits,
    cases,
    cost_rows,
    measure,
    report,
    supernet_engine,
)
from gearshift.bench.serving_shapes import ServedShape
from gearshift.files import read_json_lines
from gearshift.search.cost_rows import read_cost_rows

TINY = ServedShape.named("tiny")
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 192,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "block_size": 16,
    "num_gpu_blocks_override": 100,
    "enforce_eager": True,
    "worker_cls": "tests.serve.vllm.replayed.ReplayedWorker",
}


def test_requests_decode_at_their_context_without_prompts(tmp_path: Path) -> None:
    engine = supernet_engine(TINY, tmp_path, OPTIONS)
    chosen = cases(TINY, [96])
    assert [(case.name, case.batch) for case in chosen] == [("half", 0), ("fast", 0)]
    assert batch_that_fits(engine, chosen[0], 1000) < batch_that_fits(engine, chosen[1], 1000)
    assert batch_that_fits(engine, chosen[1], 3) == 3
    measure(engine, chosen, TINY, tmp_path / "rows.jsonl", time.perf_counter(), 4)
    rows = read_json_lines(tmp_path / "rows.jsonl")
    assert [row["batch_size"] for row in rows] == [4, 4]
    core = engine.llm.llm_engine.engine_core.engine_core
    graphs = core.model_executor.driver_worker.worker.model_runner.cudagraph_manager.replays
    # Both presets decoded in graphs of four, and no prompt was ever computed.
    assert all(count >= 48 for (_, size), count in graphs.items() if size == 4 and count)
    assert sum(count > 0 for count in graphs.values()) == 2
    pool = core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    stock = [{**row, "placement": None, "tokens_per_second": 1.0} for row in rows[:1]]
    read = read_cost_rows(cost_rows(TINY, [*rows, *stock]))
    assert [step.batch_size for step in read.steps] == [4, 4]
    assert {row["metric"] for row in report([*rows, *stock])} == {"speedup_0k_half", "speedup_0k_fast"}


def test_the_engine_agrees_with_the_supernet(served_directory: Path, tmp_path: Path) -> None:
    copy, out = tmp_path / "supernet", tmp_path / "agreement.json"
    shutil.copytree(served_directory, copy)
    asked = ["--count", "1", "--tokens", "5", "--longest", "60", "--options", json.dumps(OPTIONS)]
    agreement([str(copy), "--out", str(out), *asked])
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * 6 and {row["asked"] for row in rows} == {"alone", "mixed"}
    assert all(row["agreement"] == 1 and row["mean_logprob_difference"] < 1e-3 for row in rows)
