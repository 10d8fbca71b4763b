"""Scores of continuations against one forward pass for each, alone."""

from __future__ import annotations

import pytest
import torch

from gearshift.evaluate.continuations import Continuation, cut_to, score_continuations
from gearshift.placement import Placement
from tests.supernet.tools import random_tokens, tiny_supernet

PLACEMENT = Placement.parse("fa swa gdn kda")


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_scores_are_those_of_each_alone(batch_size):
    model, given = tiny_supernet(0), []
    for seed, (before, after) in enumerate([(1, 1), (9, 2), (3, 7), (5, 5), (12, 1), (4, 1)]):
        ids = random_tokens(seed, before + after).tolist()
        if seed % 2:  # the model's own choice
            with torch.no_grad():
                for place in range(before, before + after):
                    ids[place] = int(
                        model(torch.tensor([ids[:place]]), placement=PLACEMENT).logits[0, -1].argmax()
                    )
        given.append(Continuation(tuple(ids[:before]), tuple(ids[before:])))
    found = dict(score_continuations(model, PLACEMENT, given, batch_size))
    assert sorted(found) == list(range(6))
    for index, one in enumerate(given):
        with torch.no_grad():
            logits = model(torch.tensor([one.context + one.tokens]), placement=PLACEMENT).logits[0]
        places = range(len(one.context) - 1, len(one.context) + len(one.tokens) - 1)
        expected = sum(float(logits[t].double().log_softmax(-1)[one.tokens[n]]) for n, t in enumerate(places))
        assert found[index].log_likelihood == pytest.approx(expected, rel=1e-4)
        assert found[index].greedy == all(
            int(logits[t].argmax()) == one.tokens[n] for n, t in enumerate(places)
        )
    assert [found[index].greedy for index in (1, 3, 5)] == [True] * 3


def test_a_context_that_is_too_long_loses_its_beginning():
    given = Continuation((1, 2, 3, 4), (5, 6))
    assert cut_to(given, 6) == given
    assert cut_to(given, 4) == Continuation((3, 4), (5, 6))
    assert cut_to(given, 2) == Continuation((4,), (5, 6))
