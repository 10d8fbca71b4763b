"""What requests mean, without any engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gearshift.errors import FileFormatError, GearshiftError
from gearshift.placement import MIXERS, Placement, PlacementError, PlacementSpace
from gearshift.presets import Preset, PresetError, write_presets
from gearshift.serve.catalog import (
    DEFAULT_LABEL,
    EXPLICIT_LABEL,
    BadPlacementError,
    Catalog,
    Choice,
    ModelNotFoundError,
    PresetExistsError,
    RequestError,
    placement_of_body,
)

FAST = Placement.parse("gdn*3")
BALANCED = Placement.parse("fa swa*2")


@pytest.fixture
def catalog() -> Catalog:
    return Catalog("net", PlacementSpace(3), [Preset("fast", FAST), Preset("balanced", BALANCED)])


def test_the_name_alone_is_the_default(catalog: Catalog):
    assert catalog.resolve("net") == catalog.resolve(None) == Choice(Placement.parse("fa*3"), DEFAULT_LABEL)


@pytest.mark.parametrize("default", ["balanced", BALANCED])
def test_the_default_can_be_chosen(default: str | Placement):
    catalog = Catalog("net", PlacementSpace(3), [Preset("balanced", BALANCED)], default)
    assert catalog.resolve("net").placement == BALANCED
    catalog.remove_preset("balanced")
    assert catalog.resolve("net").placement == BALANCED


def test_a_preset_is_named_behind_a_colon(catalog: Catalog):
    assert catalog.resolve("net:fast") == Choice(FAST, "fast")


def test_a_name_may_have_colons_itself():
    catalog = Catalog("org/net:v2", PlacementSpace(3), [Preset("fast", FAST)])
    assert catalog.resolve("org/net:v2").label == DEFAULT_LABEL
    assert catalog.resolve("org/net:v2:fast").placement == FAST
    with pytest.raises(ModelNotFoundError, match="the model 'v2:fast'"):
        catalog.resolve("v2:fast")


@pytest.mark.parametrize(
    "given", ["swa fa*2", "sliding_attention,full_attention*2", ["sliding_attention", "fa", "fa"]]
)
def test_any_placement_can_be_spelled_out(catalog: Catalog, given: object):
    assert catalog.resolve("net", given) == Choice(Placement.parse("swa fa*2"), EXPLICIT_LABEL)


def test_a_preset_and_its_own_placement_agree(catalog: Catalog):
    assert catalog.resolve("net:fast", "gdn gdn*2") == Choice(FAST, "fast")


def test_a_preset_and_another_placement_do_not(catalog: Catalog):
    with pytest.raises(BadPlacementError, match=r"'fast' is 'gdn\*3', but the request .* 'fa\*3'"):
        catalog.resolve("net:fast", "fa*3")


@pytest.mark.parametrize("model", ["net:quick", "net:", "net:fast:fast", "other", "other:fast", "", "NET"])
def test_what_is_not_served_is_404_with_what_is(catalog: Catalog, model: str):
    with pytest.raises(ModelNotFoundError) as raised:
        catalog.resolve(model)
    error = raised.value.to_json()["error"]
    assert raised.value.status == 404
    assert error["message"].endswith(
        "expected 'net', or 'net:PRESET' with one of the presets: fast, balanced"
    )
    assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert error["type"] == "invalid_request_error"


def test_without_presets_the_404_says_so():
    with pytest.raises(ModelNotFoundError, match="expected 'net', which has no presets"):
        Catalog("net", PlacementSpace(3)).resolve("net:fast")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("fa*2", "has 2 layers; expected 3"),
        ("fa*4", "has 4 layers; expected 3"),
        ("fa*999999999", "has 999999999 layers; expected 3"),
        ("fa*2 mamba", "unknown mixer 'mamba'"),
        ("fa**3", "the count '*3'"),
        ("", "is empty"),
        ([], "0 layers; expected 3"),
        (["fa", "fa", 1], "expected a list of mixer names"),
        (["fa", "fa", ["fa"]], "expected a list of mixer names"),
        (3, "of type int"),
        ({"fa": 3}, "of type dict"),
        (True, "of type bool"),
    ],
)
def test_a_malformed_placement_is_400(catalog: Catalog, given: object, said: str):
    with pytest.raises(BadPlacementError) as raised:
        catalog.resolve("net", given)
    assert said in str(raised.value)
    assert raised.value.status == 400
    assert raised.value.to_json()["error"]["param"] == "placement"


def test_mixers_that_the_model_or_the_layer_does_not_hold_are_400():
    held = (("full_attention",), ("full_attention", "gated_delta_net"))
    catalog = Catalog("net", PlacementSpace(2, ("full_attention", "gated_delta_net"), held))
    assert catalog.resolve("net", "fa gdn").label == EXPLICIT_LABEL
    with pytest.raises(BadPlacementError, match="gdn in layer 0; this layer holds only fa"):
        catalog.resolve("net", "gdn fa")
    with pytest.raises(BadPlacementError, match="kda in layer 1; this model holds only fa, gdn"):
        catalog.resolve("net", "fa kda")


@pytest.mark.parametrize(
    "given",
    [
        "fa " * 400_000,
        "a" * 1_000_000,
        " " * 1_000_000,
        "fa*" + "9" * 1_000_000,
        ["fa"] * 1_000_000,
        ["a" * 1_000_000] * 3,
        [["fa"] * 1_000_000] * 3,
    ],
    ids=["runs", "letters", "blanks", "digits", "list", "long names", "nested"],
)
def test_a_megabyte_of_placement_costs_little_and_says_little(catalog: Catalog, given: object):
    started = time.process_time()
    with pytest.raises(BadPlacementError) as raised:
        catalog.resolve("net", given)
    assert time.process_time() - started < 0.5
    assert len(str(raised.value)) < 500


def test_a_megabyte_of_model_says_little(catalog: Catalog):
    for model in ("x" * 1_000_000, "net:" + "x" * 1_000_000):
        with pytest.raises(ModelNotFoundError) as raised:
            catalog.resolve(model)
        assert len(str(raised.value)) < 500


def test_the_longest_sensible_text_of_a_placement_is_read():
    mixers = [MIXERS[layer % 4] for layer in range(48)]
    text = " ,  ".join(f"{mixer} * 000000001" for mixer in mixers)
    assert Catalog("net", PlacementSpace(48)).resolve("net", text).placement.to_json() == mixers


def test_models_lists_every_name(catalog: Catalog):
    assert catalog.models() == {
        "net": Placement.parse("fa*3"),
        "net:fast": FAST,
        "net:balanced": BALANCED,
    }


def test_every_listed_name_is_served(catalog: Catalog):
    for name, placement in catalog.models().items():
        assert catalog.resolve(name).placement == placement


def test_presets_come_and_go(catalog: Catalog):
    before = catalog.presets
    chosen = catalog.resolve("net:fast")
    catalog.add_preset(Preset("new", Placement.parse("kda*3")))
    assert catalog.remove_preset("fast").placement == FAST
    assert list(catalog.models()) == ["net", "net:balanced", "net:new"]
    assert list(before) == ["fast", "balanced"]
    assert chosen.placement == FAST
    with pytest.raises(ModelNotFoundError, match="presets: balanced, new"):
        catalog.resolve("net:fast")


def test_a_name_keeps_its_meaning_while_it_is_there(catalog: Catalog):
    catalog.add_preset(Preset("fast", FAST))
    with pytest.raises(PresetExistsError, match=r"'fast' is already 'gdn\*3'; remove it first") as raised:
        catalog.add_preset(Preset("fast", BALANCED))
    assert raised.value.status == 409
    assert catalog.resolve("net:fast").placement == FAST


def test_presets_that_do_not_fit_are_refused(catalog: Catalog):
    with pytest.raises(BadPlacementError, match="2 layers; expected 3"):
        catalog.add_preset(Preset("short", Placement.parse("fa*2")))
    with pytest.raises(ModelNotFoundError, match="no preset 'gone' to remove"):
        catalog.remove_preset("gone")


def test_many_threads_may_change_it(catalog: Catalog):
    names = [f"p{number}" for number in range(200)]
    failures = []

    def change(mine: list[str]) -> None:
        try:
            for name in mine:
                catalog.add_preset(Preset(name, FAST))
                assert catalog.resolve(f"net:{name}").placement == FAST
                assert set(catalog.models()) >= {"net", f"net:{name}"}
            for name in mine[1:]:
                catalog.remove_preset(name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=change, args=[names[start::4]]) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert set(catalog.presets) == {"fast", "balanced", *names[:4]}


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({}, None),
        ({"vllm_xargs": None}, None),
        ({"vllm_xargs": {"other": 1}}, None),
        ({"vllm_xargs": {"placement": "fa*3"}}, "fa*3"),
        ({"placement": "fa*3"}, "fa*3"),
        ({"placement": "fa*3", "vllm_xargs": {"placement": "fa*3"}}, "fa*3"),
    ],
)
def test_where_a_body_spells_a_placement_out(body: Mapping[str, Any], found: object):
    assert placement_of_body(body) == found


@pytest.mark.parametrize(
    "body", [{"vllm_xargs": "fa*3"}, {"placement": "a", "vllm_xargs": {"placement": "b"}}]
)
def test_a_body_that_contradicts_itself_is_400(body: Mapping[str, Any]):
    with pytest.raises(BadPlacementError):
        placement_of_body(body)


def test_a_catalog_that_cannot_be_is_refused():
    with pytest.raises(RequestError, match="name is ' '"):
        Catalog(" ", PlacementSpace(3))
    with pytest.raises(PresetError, match="no preset 'quick'"):
        Catalog("net", PlacementSpace(3), [Preset("fast", FAST)], "quick")
    with pytest.raises(PlacementError, match="2 layers; expected 3"):
        Catalog("net", PlacementSpace(3), [Preset("short", Placement.parse("fa*2"))])
    with pytest.raises(PlacementError, match="2 layers; expected 3"):
        Catalog("net", PlacementSpace(3), default=Placement.parse("fa*2"))


def test_from_a_directory(supernet_directory: Path, tmp_path: Path):
    directory = shutil.copytree(supernet_directory, tmp_path / "supernet")
    write_presets(directory, [Preset("fast", FAST)])
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "placement": "swa*3"}))
    catalog = Catalog.from_directory(directory)
    assert list(map(str, catalog.models().values())) == ["swa*3", "gdn*3"]
    assert list(catalog.models()) == ["supernet", "supernet:fast"]
    assert catalog.space == PlacementSpace(3)
    named = Catalog.from_directory(directory, "net", "fast")
    assert list(map(str, named.models().values())) == ["gdn*3", "gdn*3"]
    (directory / "config.json").write_text("{")
    with pytest.raises(FileFormatError):
        Catalog.from_directory(directory)


def test_a_directory_that_is_no_supernet(teacher_directory: Path):
    with pytest.raises(GearshiftError, match="make a supernet of it"):
        Catalog.from_directory(teacher_directory)


def test_no_torch_is_loaded():
    code = "import sys, gearshift.serve.catalog; print({'torch', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
