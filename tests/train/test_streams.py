"""Hugging Face data sets as they stream; local files stand in for the hub."""

from __future__ import annotations

import json

import pytest

from gearshift.train.documents import DataError, StreamedDocuments
from gearshift.train.recipe import DataSource

pytest.importorskip("datasets")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three shards of four documents."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    root = tmp_path / "books"
    root.mkdir()
    for shard in range(3):
        lines = [json.dumps({"text": f"document {shard}-{n}"}) for n in range(4)]
        (root / f"part-{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def opened(folder):
    return StreamedDocuments.open(DataSource(dataset=str(folder)))


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_lanes_share_the_documents(folder, lanes):
    readers = [opened(folder).lane(index, lanes, (0,)) for index in range(lanes)]
    drawn = [reader.next()["text"] for reader in readers for _ in range(12 // lanes)]
    assert len(set(drawn)) == 12
    again = [reader.next()["text"] for reader in readers for _ in range(12 // lanes)]
    assert set(again) == set(drawn)


@pytest.mark.parametrize("taken", [0, 1, 5, 6, 7, 12])
def test_a_restored_lane_goes_on_with_the_next_document(folder, taken):
    reader = opened(folder).lane(1, 2, (0,))
    for _ in range(taken):
        reader.next()
    state = json.loads(json.dumps(reader.state()))
    expected = [reader.next()["text"] for _ in range(8)]
    other = opened(folder).lane(1, 2, (0,))
    other.restore(state)
    assert [other.next()["text"] for _ in range(8)] == expected


def test_too_few_documents_are_told(folder):
    reader = opened(folder).lane(13, 14, (0,))
    with pytest.raises(DataError, match="has fewer documents than a step has sequences"):
        reader.next()


def test_a_data_set_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"data set .*nowhere cannot be opened .*check its name, 'config'"):
        opened(tmp_path / "nowhere")
