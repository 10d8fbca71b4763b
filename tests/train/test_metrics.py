from __future__ import annotations

import json

import pytest

from gearshift.errors import FileFormatError
from gearshift.train.metrics import MetricsLog


def lines(path):
    return path.read_text().splitlines()


def test_rows_are_on_disk_as_soon_as_they_are_appended(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path, 0) as log:
        log.append({"step": 1, "loss": 0.5})
        assert [json.loads(line) for line in lines(path)] == [{"step": 1, "loss": 0.5}]


def test_surplus_and_torn_rows_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    with MetricsLog(path, 2) as log:
        log.append({"step": 3})
    assert lines(path) == ['{"step": 1}', '{"step": 2}', '{"step": 3}']


def test_a_fresh_run_starts_a_fresh_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    with MetricsLog(path, 0):
        assert lines(path) == []


def test_a_log_of_another_kind_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("not json\n")
    with pytest.raises(FileFormatError, match="line 1"):
        MetricsLog(path, 5)
    assert lines(path) == ["not json"]


def test_numbers_that_json_does_not_know_are_refused(tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl", 0) as log, pytest.raises(ValueError, match="Out of range"):
        log.append({"step": 1, "loss": float("nan")})
