from __future__ import annotations

import random

import numpy as np

from gearshift.evaluate.held_out import EncodedExample, HeldOut


def test_example_batches_hold_every_example_within_the_budget():
    lengths = sorted(random.Random(1).choices(range(5, 60), k=40))
    examples = tuple(EncodedExample("copy", (1,) * length, 2) for length in lengths)
    batches = HeldOut("x", np.zeros((1, 2), dtype=np.int64), examples).example_batches(100)
    assert [example for batch in batches for example in batch] == list(examples)
    assert all(len(batch) * max(len(example.tokens) for example in batch) <= 100 for batch in batches)
