"""The adaptor in lm-eval itself: a multiple-choice task on a local file, rolling texts, generation."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

WITHOUT = "lm-eval is not installed; pip install 'gearshift[eval]' brings it"
lm_eval: Any = pytest.importorskip("lm_eval", reason=WITHOUT)
TaskManager: Any = pytest.importorskip("lm_eval.tasks", reason=WITHOUT).TaskManager

from gearshift.evaluate.lm_eval import GearshiftLM, LmEvalError  # noqa: E402
from gearshift.placement import PlacementError  # noqa: E402
from tests.supernet.tools import generate  # noqa: E402

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["a", "b", "c"]
doc_to_target: right
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def model(supernet_directory: Path) -> GearshiftLM:
    return GearshiftLM(str(supernet_directory), placement="gdn+swa fa", device="cpu", batch_size=4)


def choice(model: GearshiftLM, question: str) -> int:
    """The most likely of the choices, by a plain forward pass."""
    ids = torch.tensor([model.tok_encode(question)])
    with torch.no_grad():
        logits = model.model(ids, placement="gdn swa fa").logits[0, -1]
    return int(torch.stack([logits[model.tok_encode(f" {text}")[0]] for text in "abc"]).argmax())


def test_a_task_is_run(model: GearshiftLM, tmp_path: Path):
    questions = [f"question {number * 7}?" for number in range(8)]
    rows = [{"question": question, "right": n % 3} for n, question in enumerate(questions)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(data=data))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=["tiny_choice"], task_manager=tasks, bootstrap_iters=0)
    requests = [SimpleNamespace(args=(q, f" {text}")) for q in questions for text in "abc"]
    scores = torch.tensor([value for value, _ in model.loglikelihood(requests, disable_tqdm=True)])
    right = (scores.view(8, 3).argmax(1) == torch.tensor([row["right"] for row in rows])).float().mean()
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(float(right))


def test_whole_texts_are_scored_in_windows(model: GearshiftLM):
    text = "value = 37\n" * 20
    long = GearshiftLM.__new__(GearshiftLM)
    long.__dict__.update({**vars(model), "max_length": 1000})
    (whole,) = long.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)
    ids = torch.tensor([[model.eot_token_id, *model.tok_encode(text)]])
    with torch.no_grad():
        log = model.model(ids, placement="gdn swa fa").logits[0, :-1].double().log_softmax(-1)
    assert whole == pytest.approx(float(log.gather(1, ids[0, 1:, None]).sum()), rel=1e-4)
    (windows,) = model.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)
    assert windows != whole and windows == pytest.approx(whole, rel=0.2)


def test_answers_are_generated_up_to_a_stop(model: GearshiftLM):
    ids = torch.tensor([model.tok_encode("def f(x):")])
    made = generate(model.model, ids, placement="gdn swa fa", max_new_tokens=6)
    text = str(model.tokenizer.decode(made[0, ids.shape[1] :].tolist(), skip_special_tokens=True))
    settings = {"max_gen_toks": 6, "until": []}
    request = SimpleNamespace(args=("def f(x):", settings))
    assert model.generate_until([request], disable_tqdm=True) == [text]
    settings["until"] = [text[1]]
    assert model.generate_until([request], disable_tqdm=True) == [text.split(text[1])[0]]


def test_it_is_in_the_registry_and_refuses_what_says_nothing(supernet_directory: Path):
    assert lm_eval.api.registry.get_model("gearshift") is GearshiftLM
    with pytest.raises(LmEvalError, match="give preset=NAME or placement=RUNS"):
        GearshiftLM(str(supernet_directory))
    with pytest.raises(PlacementError, match="has 4 layers; expected 3"):
        GearshiftLM(str(supernet_directory), placement="fa*4")
