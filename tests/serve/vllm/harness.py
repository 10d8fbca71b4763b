"""A vLLM engine in the test's own process, and what it is compared with."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from gearshift.serve.vllm.coordinator import SlotCoordinator
from gearshift.serve.vllm.scheduler import PlacementScheduler
from gearshift.supernet import SupernetForCausalLM
from tests.serve.vllm.tiny import LAYERS

VOCABULARY = 257
BLOCK_TOKENS, SLOTS = 16, 6
SHORTS = ("fa", "swa", "gdn", "kda")
# Of the engines' logarithms of probabilities from the reference's; float32 gives about 1e-5.
TOLERANCE = 1e-3
TOP = 5


@dataclass(frozen=True)
class Job:
    """A request: a placement, a prompt, and how many tokens are wanted."""

    placement: str
    prompt: tuple[int, ...]
    tokens: int = 6


@dataclass
class Answer:
    """What an engine said: tokens, and for each the most likely ones with their logarithms."""

    tokens: list[int]
    logprobs: list[dict[int, float]]
    cached: int
    reason: str | None


class Engine:
    """One engine; ``options`` are those of ``vllm.LLM``."""

    def __init__(self, directory: Path, gearshift: dict[str, Any] | None = None, **options: Any) -> None:
        defaults: dict[str, Any] = {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "max_model_len": 256,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "block_size": BLOCK_TOKENS,
            "num_gpu_blocks_override": 300,
            "enforce_eager": True,
            "seed": 0,
        }
        defaults["additional_config"] = {"gearshift": {"slots": SLOTS, **(gearshift or {})}}
        self.llm = LLM(model=str(directory), **{**defaults, **options})
        self.steps: list[set[str]] = []
        self._count = 0
        self._watch_steps()

    @property
    def scheduler(self) -> PlacementScheduler:
        return self._core.scheduler

    @property
    def coordinator(self) -> SlotCoordinator:
        return self.scheduler.coordinator

    @property
    def runner(self) -> Any:
        return self._core.model_executor.driver_worker.worker.model_runner

    @property
    def model(self) -> Any:
        return self.runner.model

    @property
    def _core(self) -> Any:
        client: Any = self.llm.llm_engine.engine_core
        return client.engine_core

    def _watch_steps(self) -> None:
        """Keep the placements of every step."""
        scheduler: Any = self.scheduler
        original = scheduler.schedule

        def schedule(*args: Any) -> Any:
            output = original(*args)
            self.steps.append({str(scheduler.placed[r].placement) for r in output.num_scheduled_tokens})
            return output

        scheduler.schedule = schedule

    def submit(self, job: Job, salt: str | None = None) -> str:
        self._count += 1
        name = f"request-{self._count}"
        prompt = TokensPrompt(prompt_token_ids=list(job.prompt))
        if salt is not None:
            prompt["cache_salt"] = salt
        self.llm.llm_engine.add_request(name, prompt, _params(job))
        return name

    def step(self) -> dict[str, Answer]:
        """One step; the answers of the requests that it finished."""
        outputs: Iterable[Any] = self.llm.llm_engine.step()
        return {output.request_id: _answer(output) for output in outputs if output.finished}

    def abort(self, name: str) -> None:
        self.llm.llm_engine.abort_request([name])

    def busy(self) -> bool:
        return self.llm.llm_engine.has_unfinished_requests()

    def run(self, jobs: Sequence[Job], salt: str | None = None) -> list[Answer]:
        """All of them at once."""
        names = [self.submit(job, salt) for job in jobs]
        done: dict[str, Answer] = {}
        while self.busy():
            done |= self.step()
        return [done[name] for name in names]

    def blocks_in_use(self) -> int:
        pool = self.coordinator.block_pool
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()

    def poison(self) -> None:
        """Fill every block that nobody holds with what is not a number; block 0 is never read, either."""
        pool = self.model.slot_groups[0].pool().view(torch.float32)
        free = [block.block_id for block in self.coordinator.block_pool.blocks if block.ref_cnt == 0]
        pool.view(-1, self.model.layout.block_bytes // 4)[[0, *free]] = float("nan")


def _params(job: Job) -> SamplingParams:
    return SamplingParams(
        max_tokens=job.tokens,
        temperature=0,
        logprobs=TOP,
        ignore_eos=True,
        detokenize=False,
        extra_args={"placement": job.placement},
    )


def _answer(output: Any) -> Answer:
    said = output.outputs[0]
    logprobs = [{token: lp.logprob for token, lp in step.items()} for step in said.logprobs or []]
    return Answer(list(said.token_ids), logprobs, output.num_cached_tokens or 0, said.finish_reason)


@torch.no_grad()
def mistakes(reference: SupernetForCausalLM, job: Job, answer: Answer) -> list[str]:
    """How an answer differs from the supernet's own greedy one; nothing, if it is right.

    The reference reads the whole answer at once: where its own best token is the answer's at every place, it
    would have said the same.
    """
    assert len(answer.tokens) == job.tokens
    text = torch.tensor([[*job.prompt, *answer.tokens[:-1]]])
    logits = reference(text, placement=job.placement).logits[0, len(job.prompt) - 1 :]
    found = []
    if logits.argmax(-1).tolist() != answer.tokens:
        found.append(f"{job.placement}: {answer.tokens} instead of {logits.argmax(-1).tolist()}")
    expected = logits.log_softmax(-1)
    for place, said in enumerate(answer.logprobs):
        worst = max(abs(expected[place, token].item() - value) for token, value in said.items())
        if not worst < TOLERANCE:
            found.append(f"{job.placement}: token {place} off by {worst}")
    return found


def random_prompt(rng: random.Random, least: int, most: int) -> tuple[int, ...]:
    return tuple(rng.randrange(1, VOCABULARY) for _ in range(rng.randint(least, most)))


def random_placement(rng: random.Random, shorts: Sequence[str] = SHORTS) -> str:
    return " ".join(rng.choice(shorts) for _ in range(LAYERS))
