"""presets.json: round trip, atomic replacement, and what is refused with file and preset named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearshift.errors import FileFormatError
from gearshift.placement import MIXERS, Placement, PlacementSpace
from gearshift.presets import Measurement, Preset, PresetError, read_presets, write_presets
from gearshift.workload import Workload

fractions = st.floats(0, 1e6)
measurements = st.builds(
    Measurement,
    workload=st.builds(Workload, context_length=st.integers(1, 10**6)),
    seconds_per_token=fractions,
    speed_up=fractions,
    hardware=st.text(max_size=20),
)
presets = st.builds(
    Preset,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True),
    placement=st.lists(st.sampled_from(MIXERS), min_size=1, max_size=8).map(
        lambda names: Placement(tuple(names))
    ),
    quality=st.none() | fractions,
    retention=st.none() | fractions,
    predicted_quality=st.none() | fractions,
    measurements=st.lists(measurements, max_size=2).map(tuple),
)


def _file(directory: Path, *rows: Any) -> Path:
    path = directory / "presets.json"
    path.write_text(json.dumps({"format": "gearshift-presets-1", "presets": list(rows)}), encoding="utf-8")
    return path


@given(presets)
def test_json_round_trip(preset: Preset) -> None:
    assert Preset.from_json(json.loads(json.dumps(preset.to_json()))) == preset


def test_write_then_read_keeps_order_and_everything(tmp_path: Path) -> None:
    measured = Measurement(Workload(2048, concurrency=4), 0.004, 1.7, "a processor, 2 cores")
    written = [
        Preset("teacher", Placement.parse("fa*3"), 0.4, 1.0),
        Preset("fast", Placement.parse("fa gdn*2"), None, None, 0.31, (measured,)),
    ]
    write_presets(tmp_path, written)
    found = read_presets(tmp_path, PlacementSpace(3))
    assert list(found) == ["teacher", "fast"]
    assert list(found.values()) == written
    write_presets(tmp_path, found)
    assert read_presets(tmp_path) == found
    assert [path.name for path in tmp_path.iterdir()] == ["presets.json"]


def test_no_file_means_no_presets(tmp_path: Path) -> None:
    assert read_presets(tmp_path) == {}


def test_by_hand_a_name_and_a_text_placement_suffice(tmp_path: Path) -> None:
    _file(tmp_path, {"name": "mine", "placement": "fa*2 swa"})
    assert read_presets(tmp_path) == {"mine": Preset("mine", Placement.parse("fa*2 swa"))}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"placement": ["fa"]}, "no key 'name'"),
        ({"name": "x"}, "no key 'placement'"),
        ({"name": "x", "placement": ["fa"], "speed": 2}, "unknown key 'speed'"),
        ({"name": "x", "placement": ["mamba"]}, "unknown mixer 'mamba'"),
        ({"name": "x", "placement": "fa*0"}, "the count '0'"),
        ({"name": "x", "placement": 3}, "expected a list of mixer names"),
        ({"name": "a b", "placement": ["fa"]}, "the preset name 'a b'"),
        ({"name": 7, "placement": ["fa"]}, "the preset name 7"),
        ({"name": "x", "placement": ["fa"], "quality": "good"}, "quality = 'good'"),
        ({"name": "x", "placement": ["fa"], "retention": math.nan}, "retention = nan"),
        ({"name": "x", "placement": ["fa"], "retention": -0.5}, "retention = -0.5"),
        ({"name": "x", "placement": ["fa"], "measurements": {}}, "measurements = {}"),
        ({"name": "x", "placement": ["fa"], "measurements": [{}]}, "a measurement has no key 'workload'"),
        ("x", "expected a JSON object"),
    ],
)
def test_bad_rows_name_file_and_preset(tmp_path: Path, row: Any, says: str) -> None:
    path = _file(tmp_path, {"name": "fine", "placement": ["fa"]}, row)
    with pytest.raises(PresetError) as caught:
        read_presets(tmp_path)
    name = row.get("name") if isinstance(row, dict) else None
    assert f"{path}, preset 2 ({name!r})" in str(caught.value)
    assert says in str(caught.value)


def test_bad_measurements_are_refused(tmp_path: Path) -> None:
    good = Measurement(Workload(8), 0.1, 1.0, "cpu").to_json()
    for change in (
        {"speed_up": -1},
        {"seconds_per_token": None},
        {"hardware": 3},
        {"workload": {"context_length": 0}},
    ):
        _file(tmp_path, {"name": "x", "placement": ["fa"], "measurements": [{**good, **change}]})
        with pytest.raises(PresetError, match="preset 1 \\('x'\\)"):
            read_presets(tmp_path)


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    same = [Preset("fast", Placement.parse("gdn")), Preset("fast", Placement.parse("kda"))]
    with pytest.raises(PresetError, match="'fast' is there twice"):
        write_presets(tmp_path, same)
    assert not list(tmp_path.iterdir())
    _file(tmp_path, *(preset.to_json() for preset in same))
    with pytest.raises(PresetError, match="presets.json: the preset 'fast' is there twice"):
        read_presets(tmp_path)


def test_lengths_must_agree_with_each_other_and_the_model(tmp_path: Path) -> None:
    rows = [Preset("a", Placement.parse("fa*2")), Preset("b", Placement.parse("fa*3"))]
    with pytest.raises(PresetError, match="'b' has 3 layers; expected 2, as the preset 'a'"):
        write_presets(tmp_path, rows)
    write_presets(tmp_path, rows[:1])
    with pytest.raises(PresetError, match="preset 'a': .*has 2 layers; expected 12"):
        read_presets(tmp_path, PlacementSpace(12))
    with pytest.raises(PresetError, match="preset 'a': .*this model holds only gdn"):
        read_presets(tmp_path, PlacementSpace(2, ("gdn",)))


@pytest.mark.parametrize(
    "content", ['{"presets": []}', '{"format": "gearshift-presets-9", "presets": []}', "[]", "3"]
)
def test_another_format_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "presets.json").write_text(content, encoding="utf-8")
    with pytest.raises(PresetError, match="gearshift-presets-1"):
        read_presets(tmp_path)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "presets.json").write_text('{"format": "gearshift-presets-1", "pre', encoding="utf-8")
    with pytest.raises(FileFormatError, match="not valid JSON"):
        read_presets(tmp_path)
    (tmp_path / "presets.json").write_text('{"format": "gearshift-presets-1"}', encoding="utf-8")
    with pytest.raises(PresetError, match='"presets" is None'):
        read_presets(tmp_path)
