"""Prefix caching: found by the same placement only, and right whatever it was cut to."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; tests/serve/vllm/rig says how")

from gearshift.serve.vllm.policy import TurnPolicy
from gearshift.supernet import SupernetForCausalLM, load_supernet
from tests.serve.vllm.harness import Answer, Engine, Job, mistakes, random_prompt


@pytest.fixture(scope="module")
def reference(served_directory: Path) -> SupernetForCausalLM:
    return load_supernet(served_directory)


@pytest.fixture(scope="module")
def engine(served_directory: Path) -> Engine:
    engine = Engine(served_directory, num_gpu_blocks_override=600)
    engine.poison()
    return engine


def ask(engine: Engine, reference: SupernetForCausalLM, job: Job, salt: str | None = None) -> Answer:
    answer = engine.run([job], salt)[0]
    assert mistakes(reference, job, answer) == []
    return answer


# What one block covers differs: six layers fill a group; five are 3 + 2, for which a block covers two and
# three times as many tokens; one layer has all six slots of a block.
@pytest.mark.parametrize("placement", ["fa*6", "fa*5 swa", "swa*6", "fa*3 swa*3", "fa*4 swa*2"])
def test_a_prefix_is_found_by_the_same_placement(engine, reference, placement):
    found, rng = 192, random.Random(placement)
    prompt = random_prompt(rng, 205, 205)
    assert ask(engine, reference, Job(placement, prompt)).cached == 0
    assert ask(engine, reference, Job(placement, prompt)).cached == found
    other_end = prompt[:200] + random_prompt(rng, 10, 10)
    assert ask(engine, reference, Job(placement, other_end)).cached == found


def test_a_prefix_is_not_found_by_another_placement_or_salt(engine, reference):
    prompt = random_prompt(random.Random(0), 150, 150)
    assert ask(engine, reference, Job("fa*6", prompt)).cached == 0
    # The last three use the same groups of the cache.
    for placement in ("fa*5 swa", "fa*3 swa*3", "swa*3 fa*3", "fa*2 swa*3 fa"):
        assert ask(engine, reference, Job(placement, prompt)).cached == 0
    assert ask(engine, reference, Job("fa*6", prompt), salt="mine").cached == 0
    assert ask(engine, reference, Job("fa*6", prompt), salt="mine").cached == 144
    assert ask(engine, reference, Job("fa, fa*5", prompt)).cached == 144


def test_recurrent_layers_find_no_prefix_and_stay_right(engine, reference):
    prompt = random_prompt(random.Random(1), 150, 150)
    for _ in range(2):
        assert ask(engine, reference, Job("fa*5 gdn", prompt)).cached == 0


def test_hits_side_by_side_with_others(engine, reference):
    rng = random.Random(2)
    shared = random_prompt(rng, 100, 100)
    placements = ["fa*6", "swa*6", "fa*3 swa*3", "gdn*6", "fa*2 kda*4"]
    jobs = [Job(placement, shared + random_prompt(rng, 3, 40)) for placement in placements * 2]
    answers = engine.run(jobs)
    for job, answer in zip(jobs, answers, strict=True):
        assert mistakes(reference, job, answer) == []
    assert engine.blocks_in_use() == 0


@pytest.mark.parametrize("limit", [1, 2])
def test_no_step_has_more_placements_than_allowed(engine, reference, limit):
    rng = random.Random(limit)
    engine.scheduler.turns = TurnPolicy(limit)
    engine.steps.clear()
    placements = ["fa*6", "swa*6", "gdn*6", "kda*6", "fa gdn swa kda fa swa"]
    jobs = [Job(placement, random_prompt(rng, 5, 90), 4) for placement in placements * 2]
    answers = engine.run(jobs)
    engine.scheduler.turns = TurnPolicy(0)
    assert [mistakes(reference, job, answer) for job, answer in zip(jobs, answers, strict=True)] == [[]] * 10
    busy = [step for step in engine.steps if step]
    assert max(map(len, busy)) == limit
    # None starves: while all want to run, each has had its turn after one round.
    assert len(set().union(*busy[: -(-len(placements) // limit)])) == len(placements)
