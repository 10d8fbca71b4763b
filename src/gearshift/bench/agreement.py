"""What vLLM serves against the supernet itself: the same greedy tokens, with the same probabilities?

    python -m gearshift.bench.agreement SUPERNET --out agreement.json

Every placement answers alone, which uses its own graphs on a GPU, and all of them in one mixed batch. The
reference reads each answer at once, in float32: where its own best token is the answer's, they agree.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gearshift.files import write_json
from gearshift.placement import Placement
from gearshift.presets import Preset, write_presets
from gearshift.provenance import provenance
from gearshift.supernet import SupernetForCausalLM, load_supernet
from gearshift.supernet.checkpoint import read_config

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A placement and a prompt."""

    placement: Placement
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """Tokens, and the logarithm of each one's probability."""

    tokens: list[int]
    logprobs: list[float]


def questions(
    directory: Path, placements: Sequence[Placement], count: int, longest: int, seed: int = 0
) -> list[Question]:
    """Random prompts for every placement, some shorter and some longer than a page."""
    vocabulary = read_config(directory).vocab_size
    assert vocabulary is not None
    rng = random.Random(seed)
    return [
        Question(placement, tuple(rng.randrange(1, vocabulary) for _ in range(rng.randint(8, longest))))
        for placement in placements
        for _ in range(count)
    ]


def ask(llm: Any, asked: Sequence[Question], tokens: int) -> list[Answer]:  # noqa: ANN401 - a vllm.LLM
    """All questions at once."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=list(question.prompt)) for question in asked]
    params = [
        SamplingParams(
            max_tokens=tokens,
            temperature=0,
            logprobs=1,
            ignore_eos=True,
            detokenize=False,
            extra_args={"placement": str(question.placement)},
        )
        for question in asked
    ]
    said = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    return [
        Answer(
            list(answer.token_ids),
            [step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)],
        )
        for answer in said
    ]


@torch.no_grad()
def compare(model: SupernetForCausalLM, question: Question, answer: Answer) -> Row:
    """How many tokens are the reference's own best ones, and by how much the logarithms differ."""
    device = next(model.parameters()).device
    text = torch.tensor([[*question.prompt, *answer.tokens[:-1]]], device=device)
    logits = model(text, placement=question.placement).logits[0, len(question.prompt) - 1 :].float()
    own = logits.log_softmax(-1)
    chosen = own.gather(1, torch.tensor(answer.tokens, device=device)[:, None])[:, 0]
    difference = (chosen - torch.tensor(answer.logprobs, device=device)).abs()
    return {
        "placement": str(question.placement),
        "tokens": len(answer.tokens),
        "agreed": int((own.argmax(-1).cpu() == torch.tensor(answer.tokens)).sum()),
        "difference": difference.mean().item(),
    }


def summary(rows: Sequence[Row]) -> list[Row]:
    """A row for each placement and way of asking."""
    found = []
    for key in dict.fromkeys((row["placement"], row["asked"]) for row in rows):
        own = [row for row in rows if (row["placement"], row["asked"]) == key]
        tokens = sum(row["tokens"] for row in own)
        found.append(
            {
                "placement": key[0],
                "asked": key[1],
                "tokens": tokens,
                "agreement": sum(row["agreed"] for row in own) / tokens,
                "mean_logprob_difference": sum(row["difference"] * row["tokens"] for row in own) / tokens,
            }
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask, compare, print a line for each row and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("supernet", type=Path, help="a supernet directory; its presets.json is replaced")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--placements", help="separated by semicolons; each mixer alone and two mixtures")
    parser.add_argument("--options", default="{}", help="further options of vllm.LLM, as JSON")
    parser.add_argument("--count", type=int, default=4, help="prompts for each placement")
    parser.add_argument("--longest", type=int, default=400, help="tokens of a prompt at most")
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    given = parser.parse_args(arguments)
    space = read_config(given.supernet).placement_space
    placements = [Placement.parse(text) for text in (given.placements or "").split(";") if text]
    if not placements:
        rng = random.Random(0)
        placements = [Placement.uniform(mixer, len(space.default)) for mixer in space.mixers]
        placements += [Placement(tuple(rng.choices(space.mixers, k=len(space.default)))) for _ in range(2)]
    write_presets(given.supernet, [Preset(f"p{i}", placement) for i, placement in enumerate(placements)])
    asked = questions(given.supernet, placements, given.count, given.longest)
    rows = _compare_all(given.supernet, asked, _ask_both_ways(given, asked, placements))
    write_json(given.out, {"provenance": provenance(), "options": given.options, "rows": rows})
    for row in rows:
        print(row, flush=True)


def _ask_both_ways(
    given: argparse.Namespace, asked: list[Question], placements: list[Placement]
) -> dict[str, list[Answer]]:
    from vllm import LLM

    own = {"dtype": "bfloat16", "max_model_len": 512, "max_num_seqs": 32, "gpu_memory_utilization": 0.3}
    llm = LLM(str(given.supernet), skip_tokenizer_init=True, **(own | json.loads(given.options)))
    alone: list[Answer] = []
    for placement in placements:
        alone += ask(llm, [q for q in asked if q.placement == placement], given.tokens)
    return {"alone": alone, "mixed": ask(llm, asked, given.tokens)}


def _compare_all(directory: Path, asked: list[Question], answers: dict[str, list[Answer]]) -> list[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_supernet(directory).eval()
    model.to(torch.device(device))  # pyright: ignore[reportArgumentType] - Transformers wraps the method
    return summary(
        [
            {"asked": way, **compare(model, question, answer)}
            for way, said in answers.items()
            for question, answer in zip(asked, said, strict=True)
        ]
    )


if __name__ == "__main__":
    main()
