from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gearshift.train.calibrate.activations import map_activations, write_activations
from gearshift.train.calibrate.settings import CalibrationError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    windows=st.integers(1, 7),
    tokens=st.integers(1, 5),
    width=st.integers(1, 6),
    size=st.integers(1, 8),
    dtype=st.sampled_from(DTYPES),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    windows: int,
    tokens: int,
    width: int,
    size: int,
    dtype: torch.dtype,
):
    folder = tmp_path_factory.mktemp("activations") / "work"
    one, other = (values(windows, tokens, width, seed=seed).to(dtype) for seed in (1, 2))
    batches = zip(one.split(size), other.split(size), strict=True)
    write_activations(batches, (folder / "one", folder / "other"))
    for name, expected in (("one", one), ("other", other)):
        found = map_activations(folder / name, (windows, tokens, width), dtype)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
    assert {path.name for path in folder.iterdir()} == {"one", "other"}


def test_numbers_that_do_not_follow_each_other_are_written_in_order(tmp_path: Path):
    transposed = values(3, 5, 4).transpose(1, 2)
    write_activations([(transposed,)], (tmp_path / "file",))
    assert torch.equal(map_activations(tmp_path / "file", (3, 4, 5), torch.float32), transposed)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    paths = (tmp_path / "one", tmp_path / "other")
    write_activations([(values(1, 2, 3), values(1, 2, 3))], paths)
    before = [path.read_bytes() for path in paths]

    def broken():
        yield values(1, 2, 3, seed=1), values(1, 2, 3, seed=2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_activations(broken(), paths)
    assert [path.read_bytes() for path in paths] == before
    assert set(tmp_path.iterdir()) == set(paths)


def test_what_is_done_to_the_tensor_is_not_done_to_the_file(tmp_path: Path):
    write_activations([(values(1, 2, 3),)], (tmp_path / "file",))
    map_activations(tmp_path / "file", (1, 2, 3), torch.float32).zero_()
    assert torch.equal(map_activations(tmp_path / "file", (1, 2, 3), torch.float32), values(1, 2, 3))


@pytest.mark.parametrize("size", [0, 23, 25, 48])
def test_a_file_of_another_size_is_refused(tmp_path: Path, size: int):
    path = tmp_path / "run" / "work" / "hidden"
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(size))
    with pytest.raises(CalibrationError) as caught:
        map_activations(path, (1, 2, 3), torch.float32)
    assert f"{path} has {size} bytes; expected 24 bytes of hidden states" in str(caught.value)
    assert f"remove {tmp_path / 'run'} and start again" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(CalibrationError, match="hidden is missing; expected 12 bytes"):
        map_activations(tmp_path / "run" / "work" / "hidden", (1, 2, 3), torch.bfloat16)
