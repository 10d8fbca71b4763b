"""Two tensor-parallel ranks on the CPU, with real processes: what one computes, two compute."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vllm is not installed; tests/serve/vllm/rig says how")

from gearshift.supernet import load_supernet
from tests.serve.vllm.harness import SHORTS, Engine, Job, mistakes, random_placement, random_prompt
from tests.serve.vllm.tiny import LAYERS


def test_two_ranks_compute_what_the_supernet_computes(served_directory: Path):
    engine = Engine(served_directory, tensor_parallel_size=2, distributed_executor_backend="mp")
    rng = random.Random(0)
    jobs = [Job(f"{mixer}*{LAYERS}", random_prompt(rng, 20, 80)) for mixer in SHORTS]
    jobs += [Job(random_placement(rng), random_prompt(rng, 5, 60)) for _ in range(4)]
    answers = engine.run(jobs)
    reference = load_supernet(served_directory)
    assert [mistakes(reference, job, answer) for job, answer in zip(jobs, answers, strict=True)] == [[]] * 8
    assert engine.blocks_in_use() == 0
