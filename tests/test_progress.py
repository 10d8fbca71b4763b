"""What a log shows of long work; in a terminal there is a bar instead."""

from __future__ import annotations

import itertools

import pytest

import gearshift.progress as progress
from gearshift.progress import show_progress


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by two seconds whenever it is asked."""
    clock = itertools.count(0, 2)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))


def test_items_show_the_first_and_the_last_and_a_few_between(
    seconds: None, capsys: pytest.CaptureFixture[str]
):
    with show_progress("count", 6) as report:
        for count in range(1, 7):
            report(count, f"item {count}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/6", "4/6", "6/6"]
    assert lines[1] == "count 4/6  item 4  0:00:04 left"


def test_bytes_show_their_speed_and_nothing_in_the_first_seconds(
    seconds: None, capsys: pytest.CaptureFixture[str]
):
    with show_progress("write", 12_000_000, in_bytes=True) as report:
        for count in range(1, 6):
            report(count * 1_500_000, "tensor")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "write 4.5 MB of 12.0 MB, 750.0 kB/s  tensor  0:00:10 left"


def test_nothing_is_shown_where_nobody_asked(capsys: pytest.CaptureFixture[str]):
    with show_progress("count", 1, enabled=False) as report:
        report(1, "")
    assert capsys.readouterr() == ("", "")
