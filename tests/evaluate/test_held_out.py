from __future__ import annotations

import random

import numpy as np

from gearshift.evaluate.held_out import EncodedExample, HeldOut, spread_windows
from gearshift.train.data import PackedTokens


def test_example_batches_hold_every_example_within_the_budget():
    lengths = sorted(random.Random(1).choices(range(5, 60), k=40))
    examples = tuple(EncodedExample("copy", (1,) * length, 2) for length in lengths)
    batches = HeldOut("x", np.zeros((1, 2), dtype=np.int64), examples).example_batches(100)
    assert [example for batch in batches for example in batch] == list(examples)
    assert all(len(batch) * max(len(example.tokens) for example in batch) <= 100 for batch in batches)


def test_windows_are_spread_evenly_and_do_not_overlap():
    stream = PackedTokens(np.arange(1000, dtype=np.int32))
    windows = spread_windows(stream, 7, 100)
    assert (np.diff(windows, axis=1) == 1).all()
    assert windows[0, 0] == 0
    assert windows[-1, -1] == 999
    assert (windows[1:, 0] > windows[:-1, -1]).all()
    assert spread_windows(stream, 50, 100).shape == (10, 100)
