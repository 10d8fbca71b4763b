"""Decode steps through the graphs of declared placements, against `SupernetForCausalLM`."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; tests/serve/vllm/rig says how")

from gearshift.placement import Placement
from gearshift.presets import Preset, write_presets
from gearshift.serve.vllm.plugin import graph_sizes
from gearshift.supernet import SupernetForCausalLM, load_supernet
from tests.serve.vllm.harness import BLOCK_TOKENS, Engine, Job, mistakes, random_placement, random_prompt
from tests.serve.vllm.tiny import LAYERS

PRESETS = {"windows": f"swa*{LAYERS}", "states": f"gdn*2 kda*{LAYERS - 2}", "all": "fa swa gdn kda fa gdn"}


@pytest.fixture(scope="module")
def directory(served_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("presets") / "supernet"
    shutil.copytree(served_directory, copy)
    write_presets(copy, [Preset(name, Placement.parse(text)) for name, text in PRESETS.items()])
    return copy


@pytest.fixture(scope="module")
def reference(directory: Path) -> SupernetForCausalLM:
    return load_supernet(directory)


@pytest.fixture
def engine(module_engine: Engine) -> Engine:
    module_engine.poison()
    for graph in module_engine.runner.cudagraph_manager.graphs.values():
        graph.count = 0
    return module_engine


@pytest.fixture(scope="module")
def module_engine(directory: Path) -> Engine:
    return Engine(directory, worker_cls="tests.serve.vllm.replayed.ReplayedWorker")


def compare(engine: Engine, reference: SupernetForCausalLM, jobs: list[Job]) -> dict[tuple[int, int], int]:
    answers = engine.run(jobs)
    found = [mistakes(reference, job, answer) for job, answer in zip(jobs, answers, strict=True)]
    assert found == [[]] * len(jobs)
    assert engine.blocks_in_use() == 0
    return engine.runner.cudagraph_manager.replays


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("requests", [1, 2, 3])
def test_a_declared_placement_decodes_through_its_own_graph(engine, reference, preset, requests):
    rng = random.Random(requests)
    # Beyond the window and over the borders of blocks.
    jobs = [Job(PRESETS[preset], random_prompt(rng, 20, 28), 2 * BLOCK_TOKENS) for _ in range(requests)]
    replays = compare(engine, reference, jobs)
    number = list(PRESETS).index(preset) + 2  # the default comes first
    used = {key: count for key, count in replays.items() if count}
    assert {placement for placement, _ in used} == {number}
    assert used[number, 2 if requests < 3 else 4] >= BLOCK_TOKENS


def test_placements_without_graphs_and_mixed_steps_run_beside_them(engine, reference):
    rng = random.Random(5)
    others = [Job(random_placement(rng), random_prompt(rng, 5, 40), 5) for _ in range(3)]
    declared = [Job(PRESETS["all"], random_prompt(rng, 5, 40), 12) for _ in range(2)]
    replays = compare(engine, reference, [*others, *declared])
    assert 0 < replays[4, 2] < 12 and sum(replays.values()) == replays[4, 2]


def test_more_requests_than_the_largest_graph_run_without_one(engine, reference):
    rng = random.Random(6)
    jobs = [Job(PRESETS["states"], random_prompt(rng, 5, 9), 5) for _ in range(6)]
    assert not any(compare(engine, reference, jobs).values())


def test_a_prompt_of_one_token_starts_with_no_state(engine, reference):
    job = Job(PRESETS["states"], (7,), 5)
    replays = compare(engine, reference, [job, job])
    assert replays[3, 2] == 4


def test_graph_sizes_grow_by_a_quarter_at_most():
    sizes = graph_sizes(500)
    assert sizes[0] == 1 and sizes[-1] == 500 and len(sizes) < 30
    assert all(
        later <= max(before + 4, 1.25 * before) for before, later in zip(sizes, sizes[1:], strict=False)
    )
    assert graph_sizes(3) == [1, 2, 3]
