"""The engine against `SupernetForCausalLM`: every mixer, mixed placements, alone and side by side.

The pool is full of NaN before the first request, and again whatever is free between the tests, so that
reading a page that was never written shows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; tests/serve/vllm/rig says how")

import torch
from gearshift_rig.block_tables import compute_slot_mappings, gather_block_tables, replaced

from gearshift.supernet import SupernetForCausalLM, load_supernet
from tests.serve.vllm.harness import (
    BLOCK_TOKENS,
    SHORTS,
    Engine,
    Job,
    mistakes,
    random_placement,
    random_prompt,
)
from tests.serve.vllm.tiny import LAYERS


@pytest.fixture(scope="module")
def reference(served_directory: Path) -> SupernetForCausalLM:
    return load_supernet(served_directory)


@pytest.fixture(scope="module")
def module_engine(served_directory: Path) -> Engine:
    return Engine(served_directory)


@pytest.fixture
def engine(module_engine: Engine) -> Iterator[Engine]:
    module_engine.poison()
    module_engine.steps.clear()
    yield module_engine
    assert module_engine.blocks_in_use() == 0
    assert not module_engine.scheduler.placed and not module_engine.coordinator._shares


def run_and_compare(engine: Engine, reference: SupernetForCausalLM, jobs: list[Job]) -> None:
    answers = engine.run(jobs)
    assert [mistakes(reference, job, answer) for job, answer in zip(jobs, answers, strict=True)] == [
        []
    ] * len(jobs)


@pytest.mark.parametrize("mixer", SHORTS)
def test_one_mixer_in_every_layer_alone(engine, reference, mixer):
    # Longer than a step and than the window, so that the prompt comes in pieces.
    prompt = random_prompt(random.Random(mixer), 70, 70)
    run_and_compare(engine, reference, [Job(f"{mixer}*{LAYERS}", prompt, 4)])


def test_placements_of_all_kinds_side_by_side(engine, reference):
    rng = random.Random(1)
    jobs = [Job(f"{mixer}*{LAYERS}", random_prompt(rng, 5, 60)) for mixer in SHORTS]
    jobs += [Job(random_placement(rng), random_prompt(rng, 5, 110)) for _ in range(4)]
    run_and_compare(engine, reference, jobs)
    assert max(map(len, engine.steps)) >= 6


def test_more_requests_than_run_at_once(engine, reference):
    rng = random.Random(2)
    jobs = [Job(random_placement(rng), random_prompt(rng, 2, 30), rng.randint(1, 6)) for _ in range(14)]
    run_and_compare(engine, reference, jobs)


def test_the_same_request_alone_and_in_company(engine):
    rng = random.Random(3)
    job = Job("fa gdn*2 swa kda fa", random_prompt(rng, 50, 50), 8)
    alone = engine.run([job])[0]
    company = [Job(random_placement(rng), random_prompt(rng, 5, 60)) for _ in range(5)]
    assert engine.run([*company, job])[-1].tokens == alone.tokens


def test_aborts_in_mid_flight_leave_the_others_alone(engine, reference):
    rng = random.Random(4)
    jobs = [Job(random_placement(rng), random_prompt(rng, 30, 80), 8) for _ in range(6)]
    names = [engine.submit(job) for job in jobs]
    done = {}
    for round_ in range(100):
        if not engine.busy():
            break
        done |= engine.step()
        if round_ in (1, 4, 7):  # in the prompt, soon after it, and while decoding
            engine.abort(names[round_ // 3])
            engine.poison()
    assert set(names) - set(done) == set(names[:3])
    for name in names[3:]:
        assert mistakes(reference, jobs[names.index(name)], done[name]) == []


def test_a_request_holds_the_bytes_that_its_placement_needs(engine):
    layout, rng = engine.model.layout, random.Random(5)
    for placement in ("fa*6", "swa*6", "gdn*6", "fa*2 swa gdn*3", "kda fa*5"):
        engine.submit(Job(placement, random_prompt(rng, 100, 100), 4))
        ((name, request),) = engine.scheduler.requests.items()
        while len(request.output_token_ids) < 2:  # what left the window during the prompt is free by then
            engine.step()
        held = engine.coordinator.blocks_held(name) * layout.block_bytes
        needed = needed_bytes(engine, placement, len(request.all_token_ids))
        # Rounding: one page of each layer, one super-page of each of the groups, and windows between pages.
        slack = len(engine.scheduler.placed[name].shares) * layout.block_bytes
        assert needed <= held <= needed + slack
        while engine.busy():
            engine.step()


def needed_bytes(engine: Engine, placement: str, tokens: int) -> int:
    """Pages of all tokens, of the window's tokens, or one state, whatever groups there are."""
    placed = engine.scheduler.placements.look_up(placement)
    layout, config, total = engine.model.layout, engine.model.config, 0
    for name in placed.placement:
        mixer = config.mixer_config(name)
        if name.endswith("attention") and "delta" not in name:
            seen = min(tokens, mixer.window or tokens)
            total += -(-seen // BLOCK_TOKENS) * layout["full"].page_bytes
        else:
            total += layout["state"].page_bytes
    return total


def test_a_bad_placement_ends_its_own_request_only(engine, reference):
    rng = random.Random(6)
    good = Job("fa*3 gdn*3", random_prompt(rng, 20, 20))
    answers = engine.run([Job("fa*5", (1, 2, 3)), good, Job("what*6", (1, 2, 3)), Job("", (1, 2))])
    assert [answer.reason for answer in answers] == ["error", "length", "error", "error"]
    assert mistakes(reference, good, answers[1]) == []


def test_the_rigs_block_tables_are_those_of_vllms_kernels(engine):
    tables = engine.runner.block_tables
    names = [engine.submit(Job(p, tuple(range(1, 60)), 3)) for p in ("fa*6", "swa*3 gdn*3", "fa*5 kda")]
    engine.step()
    requests = torch.tensor([2, 0, 1], dtype=torch.int32)
    starts, positions = (
        torch.tensor([0, 3, 4, 8], dtype=torch.int32),
        torch.tensor([40, 41, 42, 7, 9, 10, 30, 31]),
    )
    tables.apply_staged_writes()
    expected, found = [
        (
            [table.clone() for table in gather(tables, requests, 4)],
            slots(tables, requests, starts, positions, 9).clone(),
        )
        for gather, slots in (
            (replaced["gather"], replaced["slots"]),
            (gather_block_tables, compute_slot_mappings),
        )
    ]
    assert all(torch.equal(a, b) for a, b in zip(expected[0], found[0], strict=True))
    assert torch.equal(expected[1], found[1])
    for name in names:
        engine.abort(name)
    engine.step()
