from __future__ import annotations

import random

import pytest
import torch

from gearshift.evaluate.held_out import EncodedExample
from gearshift.evaluate.scores import RecallBatch
from gearshift.supernet import load_supernet


def parrot(ids: torch.Tensor) -> torch.Tensor:
    """Logits that predict the true next token, except after the token 9, where they say 0."""
    following = torch.cat([ids[:, 1:], ids[:, :1]], dim=1)
    said = torch.where(ids == 9, torch.zeros_like(ids), following)
    return torch.nn.functional.one_hot(said, 12).float()


@pytest.mark.parametrize(
    ("tokens", "prompt_length", "right"),
    [
        ((1, 2, 3, 4), 2, True),
        ((1, 9, 3, 4), 2, False),  # the first answer token is mispredicted
        ((1, 9, 3, 4), 3, True),  # that one is still the prompt
        ((1, 2, 9, 4), 2, False),  # the last answer token is
        ((1, 2, 3, 9), 2, True),  # nothing is asked after the answer
        ((1, 2, 3, 4, 5, 6, 9, 8), 5, False),
    ],
)
def test_an_example_is_recalled_if_all_of_its_answer_is_predicted(tokens, prompt_length, right):
    others = [EncodedExample("copy", (1, 2, 3), 1), EncodedExample("copy", tuple(range(1, 8)), 4)]
    batch = RecallBatch([others[0], EncodedExample("copy", tokens, prompt_length), others[1]])
    assert batch.recalled(parrot(batch.ids_BT)[:, batch.places_A]) == [True, right, True]


def test_padding_changes_no_recall(supernet_directory):
    model = load_supernet(supernet_directory)
    rng = random.Random(0)
    examples = []
    for length in (12, 20, 33):
        ids = [rng.randrange(1, 250) for _ in range(length)]
        for _ in range(2):  # the model's own continuation is an answer that it recalls
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), placement="gdn*3").logits[0, -1].argmax()))
        examples.append(EncodedExample("copy", tuple(ids), length))
        examples.append(EncodedExample("copy", (*ids[:-1], (ids[-1] + 1) % 250), length))
    batch = RecallBatch(examples)
    with torch.no_grad():
        logits = model(batch.ids_BT, placement="gdn*3", logits_to_keep=batch.places_A).logits
    assert batch.recalled(logits) == [True, False] * 3
