"""A pool with room for little more than one request: preemption, aborts, many requests, nothing lost."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; tests/serve/vllm/rig says how")

from gearshift.supernet import SupernetForCausalLM, load_supernet
from tests.serve.vllm.harness import Answer, Engine, Job, mistakes, random_placement, random_prompt

BLOCKS = 36


@pytest.fixture(scope="module")
def reference(served_directory: Path) -> SupernetForCausalLM:
    return load_supernet(served_directory)


@pytest.fixture(scope="module")
def engine(served_directory: Path) -> Engine:
    engine = Engine(served_directory, {"max_placements_per_step": 3}, num_gpu_blocks_override=BLOCKS)
    engine.poison()
    return engine


def count_preemptions(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    scheduler: Any = engine.scheduler
    preempted: list[str] = []
    original = scheduler._preempt_request

    def preempt(request: Any, timestamp: float) -> None:
        preempted.append(request.request_id)
        original(request, timestamp)

    monkeypatch.setattr(scheduler, "_preempt_request", preempt)
    return preempted


def test_preempted_requests_go_on_where_they_were(engine, reference, monkeypatch):
    preempted = count_preemptions(engine, monkeypatch)
    rng = random.Random(0)
    # Short prompts are let in together; their answers then outgrow the pool.
    placements = ["fa*6", "fa*5 gdn", "swa*3 fa*3", "kda*3 fa*3", "fa*4 swa gdn", "fa*6"]
    jobs = [Job(placement, random_prompt(rng, 70, 90), 24) for placement in placements]
    answers = engine.run(jobs)
    assert preempted
    assert [mistakes(reference, job, answer) for job, answer in zip(jobs, answers, strict=True)] == [[]] * 6
    assert engine.blocks_in_use() == 0


def test_a_request_longer_than_the_context_is_refused_and_nobody_notices(engine, reference):
    job = Job("fa*6", random_prompt(random.Random(1), 30, 30))
    name = engine.submit(job)
    with pytest.raises(ValueError, match="256"):
        engine.submit(Job("fa*6", random_prompt(random.Random(2), 300, 300)))
    done: dict[str, Answer] = {}
    while engine.busy():
        done |= engine.step()
    assert mistakes(reference, job, done[name]) == []


def test_two_hundred_random_requests_leave_nothing_behind(engine, reference):
    rng = random.Random(3)
    texts = [random_prompt(rng, 30, 70) for _ in range(6)]  # some prompts share their beginnings
    jobs = [
        Job(
            rng.choice(["fa*6", "swa*4 fa*2", random_placement(rng)]),
            (*rng.choice([*texts, ()]), *random_prompt(rng, 1, 40)),
            rng.randint(1, 4),
        )
        for _ in range(200)
    ]
    waiting = list(jobs)
    running: dict[str, Job] = {}
    done: dict[str, Answer] = {}
    aborted: set[str] = set()
    while waiting or engine.busy():
        for _ in range(min(rng.randint(0, 12), len(waiting))):
            job = waiting.pop()
            running[engine.submit(job)] = job
        done |= engine.step()
        alive = [name for name in running if name not in done and name not in aborted]
        if alive and rng.random() < 0.5:
            unlucky = rng.choice(alive)
            aborted.add(unlucky)
            engine.abort(unlucky)
    assert set(done) >= set(running) - aborted and len(aborted) > 10
    finished = [(running[name], answer) for name, answer in done.items() if answer.reason == "length"]
    assert len(finished) > 100
    assert [problem for job, answer in finished for problem in mistakes(reference, job, answer)] == []
    assert engine.blocks_in_use() == 0
    assert not engine.scheduler.placed and not engine.coordinator._shares and not engine.coordinator._room
    assert all(not manager.req_to_blocks for manager in engine.coordinator.single_type_managers)
