"""Windows of text to calibrate on; a few of them judge and are never learned from.

Shape letters: N windows, T tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from gearshift.train.calibrate.settings import CalibrationError, CalibrationSettings
from gearshift.train.data import DataError
from gearshift.train.tokens import pack_files

# One window in so many judges, but no more than so many: judging takes time, and a mean over a few thousand
# tokens tells mixers apart.
JUDGING_ONE_IN = 10
MOST_JUDGING = 8


@dataclass(frozen=True)
class Windows:
    """Tokens of all windows, those that judge first.

    Attributes:
        tokens_NT: the tokens.
        judging: how many windows judge.
    """

    tokens_NT: npt.NDArray[np.int64]
    judging: int

    def __len__(self) -> int:
        """The number of windows."""
        return len(self.tokens_NT)

    def draw(self, settings: CalibrationSettings, layer: int, step: int) -> npt.NDArray[np.int64]:
        """Which windows a step of a layer learns from: the same for all mixers, and for a resumed run."""
        generator = np.random.default_rng([settings.seed, layer, step])
        return generator.integers(self.judging, len(self), size=settings.batch_size)


def read_windows(data: Path, tokenizer: PreTrainedTokenizerBase, settings: CalibrationSettings) -> Windows:
    """Cut the text into windows, evenly spread over it.

    Raises:
        DataError: the text is missing, of an unknown kind or too short.
        CalibrationError: fewer tokens are asked for than two windows have.
    """
    length = settings.sequence_length
    if settings.tokens < 2 * length:
        raise CalibrationError(
            f"tokens is {settings.tokens}; expected at least two sequences of {length}: one to learn from, "
            "one to judge by"
        )
    stream = pack_files([data], tokenizer)
    if len(stream) < 2 * length:
        raise DataError(
            f"{data} has {len(stream)} tokens; expected at least two sequences of {length}: "
            "give more text, or a shorter sequence_length"
        )
    return split_windows(stream.spread_windows(settings.tokens // length, length))


def split_windows(tokens_NT: npt.NDArray[np.int64]) -> Windows:
    """Choose the windows that judge, spread evenly, and put them first."""
    count = len(tokens_NT)
    judging = min(MOST_JUDGING, max(1, count // JUDGING_ONE_IN))
    chosen = np.zeros(count, dtype=bool)
    chosen[((np.arange(judging) + 0.5) * count / judging).astype(np.int64)] = True
    return Windows(np.concatenate([tokens_NT[chosen], tokens_NT[~chosen]]), judging)
