"""Workloads: JSON round trip and refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearshift.errors import GearshiftError
from gearshift.workload import Workload, WorkloadError

workloads = st.builds(
    Workload,
    context_length=st.integers(3000, 10**6),
    prompt_tokens=st.integers(0, 2000),
    output_tokens=st.integers(0, 1000),
    concurrency=st.none() | st.integers(1, 4096),
    memory_bytes=st.none() | st.integers(1, 10**12),
)


@given(workloads)
def test_json_round_trip(workload: Workload) -> None:
    assert Workload.from_json(workload.to_json()) == workload


def test_defaults_look_at_decoding_alone() -> None:
    assert Workload.from_json({"context_length": 2048}) == Workload(2048, 0, 1, None, None)


@pytest.mark.parametrize(
    ("given_json", "says"),
    [
        ({"context_length": 0}, "context_length = 0; expected a whole number, at least 1"),
        ({"context_length": 1.5}, "context_length = 1.5"),
        ({"context_length": True}, "context_length = True"),
        ({"context_length": "2048"}, "context_length = '2048'"),
        ({"context_length": None}, "context_length = None"),
        (
            {"context_length": 8, "concurrency": 0},
            "concurrency = 0; expected a whole number, at least 1 or nothing",
        ),
        ({"context_length": 8, "prompt_tokens": -1}, "prompt_tokens = -1"),
        (
            {"context_length": 8, "prompt_tokens": 8},
            "8 prompt and 1 output tokens exceed the context_length of 8",
        ),
        ({"prompt_tokens": 8}, "no key 'context_length'"),
        ({"context_length": 8, "batch": 2}, "unknown key 'batch'"),
        ([8], "expected a JSON object"),
    ],
)
def test_bad_workloads_are_refused(given_json: object, says: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        Workload.from_json(given_json)
    assert says in str(caught.value)
    assert isinstance(caught.value, GearshiftError)
