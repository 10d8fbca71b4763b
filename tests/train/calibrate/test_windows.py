from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from gearshift.train.calibrate.settings import CalibrationError
from gearshift.train.calibrate.windows import read_windows, split_windows
from gearshift.train.data import DataError
from gearshift.train.tokens import load_tokenizer
from tests.train.calibrate.tools import random_windows, tiny_settings

counts = st.integers(2, 400)


@pytest.fixture(scope="module")
def tokenizer(teacher_directory: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(teacher_directory)


@pytest.fixture
def write(tmp_path: Path):
    """A text of random letters, one token each."""

    def write(letters: int) -> Path:
        drawn = np.random.default_rng(1).integers(ord("a"), ord("z") + 1, letters).astype(np.uint8)
        (tmp_path / "text.txt").write_bytes(drawn.tobytes())
        return tmp_path / "text.txt"

    return write


def numbered(count: int) -> np.ndarray:
    """Windows of one token, which is their place in the text."""
    return np.arange(count)[:, None]


@given(counts)
def test_every_window_judges_or_is_learned_from_and_none_does_both(count: int):
    windows = split_windows(numbered(count))
    assert len(windows) == count
    assert sorted(windows.tokens_NT[:, 0]) == list(range(count))
    assert windows.judging == min(8, max(1, count // 10))
    learned_from = windows.tokens_NT[windows.judging :, 0]
    assert len(learned_from) >= 1
    assert (np.diff(learned_from) > 0).all()


@given(counts)
def test_those_that_judge_are_spread_over_the_text(count: int):
    windows = split_windows(numbered(count))
    judging = windows.tokens_NT[: windows.judging, 0]
    apart = count / windows.judging
    assert all(abs(step - apart) < 1 for step in np.diff(judging))
    assert abs(judging[0] - apart / 2) < 1
    assert abs(count - judging[-1] - apart / 2) <= 1


@given(count=counts, seed=st.integers(0, 2**40), layer=st.integers(0, 99), step=st.integers(1, 9999))
def test_a_step_never_learns_from_what_judges(count: int, seed: int, layer: int, step: int):
    windows, settings = split_windows(numbered(count)), tiny_settings(seed=seed, batch_size=5)
    drawn = windows.draw(settings, layer, step)
    assert drawn.shape == (5,)
    assert drawn.min() >= windows.judging
    assert drawn.max() < count
    assert (drawn == windows.draw(settings, layer, step)).all()


def test_every_step_layer_and_seed_draws_its_own_and_all_windows_have_their_turn():
    windows = random_windows(count=40, judging=4)
    settings = tiny_settings(batch_size=6)
    draws = [windows.draw(settings, 0, step) for step in range(1, 60)]
    assert len({tuple(drawn) for drawn in draws}) == len(draws)
    assert set(np.concatenate(draws)) == set(range(4, 40))
    first = tuple(draws[0])
    assert tuple(windows.draw(settings, 1, 1)) != first
    assert tuple(windows.draw(tiny_settings(batch_size=6, seed=4), 0, 1)) != first


def test_windows_are_cut_from_all_over_the_text(write, tokenizer: PreTrainedTokenizerBase):
    path = write(10_007)
    stream = tokenizer(path.read_text())["input_ids"]
    windows = read_windows(path, tokenizer, tiny_settings(tokens=50 * 16 + 15, sequence_length=16))
    assert windows.tokens_NT.shape == (50, 16)
    assert windows.tokens_NT.dtype == np.int64
    starts = sorted(_find(stream, window) for window in windows.tokens_NT.tolist())
    assert starts[0] == 0
    assert starts[-1] == len(stream) + 1 - 16  # and an end token
    assert all(abs(step - 10_008 / 50) < 6 for step in np.diff(starts))


@pytest.mark.parametrize("letters", [99, 100, 113, 1000])
def test_windows_do_not_overlap(letters: int, write, tokenizer: PreTrainedTokenizerBase):
    path = write(letters)
    stream = tokenizer(path.read_text())["input_ids"]
    windows = read_windows(path, tokenizer, tiny_settings(tokens=10**6, sequence_length=10))
    assert len(windows) == (letters + 1) // 10
    starts = sorted(_find(stream, window) for window in windows.tokens_NT.tolist())
    assert min(np.diff(starts)) >= 10


def _find(stream: list[int], window: list[int]) -> int:
    """Where a window lies; its last token may be the end token."""
    whole = [*stream, 0]
    places = [n for n in range(len(stream)) if whole[n : n + len(window)] == window]
    assert len(places) == 1, "a random text has no window twice"
    return places[0]


def test_fewer_tokens_than_two_windows_are_refused(write, tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(CalibrationError, match="tokens is 31; expected at least two sequences of 16"):
        read_windows(write(1000), tokenizer, tiny_settings(tokens=31, sequence_length=16))
    windows = read_windows(write(1000), tokenizer, tiny_settings(tokens=32, sequence_length=16))
    assert (len(windows), windows.judging) == (2, 1)


def test_a_text_shorter_than_two_windows_is_refused(write, tokenizer: PreTrainedTokenizerBase):
    settings = tiny_settings(sequence_length=16)
    with pytest.raises(DataError, match="text.txt has 31 tokens; expected at least two sequences of 16"):
        read_windows(write(30), tokenizer, settings)
    assert len(read_windows(write(31), tokenizer, settings)) == 2
    with pytest.raises(DataError, match="text.txt has 1 tokens"):
        read_windows(write(0), tokenizer, settings)


def test_a_text_that_is_not_there_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase):
    with pytest.raises(DataError, match="nowhere.txt does not exist"):
        read_windows(tmp_path / "nowhere.txt", tokenizer, tiny_settings())
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(DataError, match="table.csv is of an unknown kind"):
        read_windows(tmp_path / "table.csv", tokenizer, tiny_settings())
