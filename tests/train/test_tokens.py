from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gearshift.train.tokens import TokenizerError, check_vocabulary


def test_tokens_that_the_model_does_not_know_are_refused():
    check_vocabulary(np.array([[0, 4], [1, 2]]), 5, Path("x"))
    with pytest.raises(TokenizerError, match="tokenizer in x made token 4, but the model knows 4; copy the"):
        check_vocabulary(np.array([[0, 4], [1, 2]]), 4, Path("x"))
