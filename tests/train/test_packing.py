"""Documents, lanes, rows and micro-batches: what comes next is the same after any restart."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gearshift.train.documents import DataError, JsonLinesDocuments, MemoryDocuments
from gearshift.train.packing import Layout, Loader, RowLane, make_batch


def encode(row, where):
    """A document's own number, once for each of its tokens."""
    tokens = np.full(row["length"], row["number"])
    return tokens, np.ones(len(tokens), dtype=bool)


def documents(lengths, name="documents", first=1):
    return MemoryDocuments(name, [{"number": first + i, "length": n} for i, n in enumerate(lengths)])


def lane(sources, place=(0, 1), weights=None, whole=False, seed=(0,)):
    weights = weights or [1.0] * len(sources)
    return RowLane(sources, weights, [encode] * len(sources), place, seed, whole)


def loader(lengths, layout):
    source = documents(lengths)
    return Loader(layout, lambda index: lane([source], (index, layout.rows)))


def tokens(batches):
    return [batch.input_ids.flatten().tolist() for batch in batches]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(2, 12))
def test_a_row_is_full_and_documents_follow_each_other(lengths, length):
    reader, seen = lane([documents(lengths)]), []
    for _ in range(6):
        row, learned, parts = reader.next_row(length)
        assert sum(parts) == length == len(row)
        assert learned.all()
        seen += row.tolist()
    runs = [seen[0]]
    count = 1
    found = []
    for before, token in zip(seen, seen[1:], strict=False):
        if token != before or count == lengths[before - 1]:
            found.append((before, count))
            runs.append(token)
            count = 0
        count += 1
    assert all(count == lengths[number - 1] for number, count in found)


def test_every_document_comes_once_before_any_comes_again():
    source = documents([1] * 30)
    lanes = [source.lane(index, 4, (3,)) for index in range(4)]
    drawn = [lanes[step % 4].next()["number"] for step in range(60)]
    assert sorted(drawn[:30]) == sorted(drawn[30:]) == list(range(1, 31))
    assert drawn[:30] != drawn[30:] != list(range(1, 31))
    other = source.lane(0, 4, (4,))
    assert [other.next()["number"] for _ in range(7)] != drawn[:28:4]


def test_shares_of_tokens_follow_the_weights():
    short, long = documents([2] * 50), documents([11] * 50, first=1000)
    reader = lane([short, long], weights=[1.0, 3.0])
    row = np.concatenate([reader.next_row(100)[0] for _ in range(40)])
    assert abs((row >= 1000).mean() - 0.75) < 0.01


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=9),
    st.lists(st.integers(1, 20), min_size=1, max_size=9),
    st.integers(0, 7),
    st.booleans(),
)
def test_a_restored_lane_goes_on_with_the_exact_next_token(one, other, rows, whole):
    def make():
        return lane([documents(one), documents(other, first=100)], weights=[1.0, 0.4], whole=whole)

    reader = make()
    for _ in range(rows):
        reader.next_row(7)
    state = json.loads(json.dumps(reader.state()))
    again = make()
    again.restore(state)
    for _ in range(5):
        row, _, lengths = reader.next_row(7)
        restored, _, restored_lengths = again.next_row(7)
        assert row.tolist() == restored.tolist()
        assert lengths == restored_lengths


def test_conversations_are_never_cut_in_two():
    reader = lane([documents([5, 6, 4, 30])], whole=True)
    for _ in range(8):
        row, learned, lengths = reader.next_row(12)
        ends = np.cumsum(lengths)
        for number, count in Counter(row.tolist()).items():
            if number:
                assert count % {1: 5, 2: 6, 3: 4, 4: 12}[number] == 0
        assert sum(lengths) == 12
        assert (learned == (row > 0)).all()
        assert ends[-1] == 12


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_processes_reads_the_same_and_can_go_on_for_another(ranks):
    lengths = [3, 8, 5, 13, 2, 7]
    alone = loader(lengths, Layout(2, 4, 6, True))
    several = [loader(lengths, Layout(2, 4, 6, True, rank, ranks)) for rank in range(ranks)]
    for _ in range(3):
        whole, shares = tokens(alone.next()), [tokens(one.next()) for one in several]
        assert [shares[m % ranks][m // ranks] for m in range(4)] == whole
    state = {key: value for one in several for key, value in one.state.items()}
    assert state == alone.state
    again = loader(lengths, Layout(2, 4, 6, True))
    again.restore(json.loads(json.dumps(state)))
    assert tokens(again.next()) == tokens(alone.next())
    for one in (alone, again, *several):
        one.close()


def test_the_state_is_that_of_what_was_handed_out_and_not_of_what_was_read_ahead():
    reader = loader([3, 8, 5], Layout(1, 1, 6, True))
    first = reader.state
    reader.next()
    after_one = reader.state
    expected = tokens(reader.next())
    for state, wanted in ((first, None), (after_one, expected)):
        other = loader([3, 8, 5], Layout(1, 1, 6, True))
        other.restore(state)
        if wanted:
            assert tokens(other.next()) == wanted
        other.close()
    reader.close()


def test_places_without_a_next_token_of_their_own_do_not_count():
    rows = [
        (np.array([1, 2, 3, 4, 5]), np.array([1, 1, 1, 1, 0], dtype=bool), [2, 3]),
        (np.array([6, 7, 8, 9, 10]), np.ones(5, dtype=bool), [5]),
    ]
    apart = make_batch(rows, True)
    assert apart.cu_seqlens is not None
    assert apart.cu_seqlens.tolist() == [0, 2, 5, 10]
    assert apart.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert apart.counted.tolist() == [[True, False, True, False, False, *[True] * 4, False]]
    assert apart.targets[apart.counted].tolist() == [2, 4, 7, 8, 9, 10]
    stream = make_batch(rows, False)
    assert stream.cu_seqlens is None
    assert stream.counted.tolist() == [[True, True, True, False, False], [*[True] * 4, False]]
    assert torch.equal(
        stream.targets[:, :-1],
        torch.where(stream.counted, stream.targets, 0)[:, :-1] + (stream.targets * ~stream.counted)[:, :-1],
    )


class TestJsonLines:
    def write(self, tmp_path, text):
        path = tmp_path / "rows.jsonl"
        path.write_text(text)
        return path

    def test_lines_are_read_from_their_places(self, tmp_path):
        path = self.write(tmp_path, '{"text": "a"}\n\n{"text": "é"}\n{"text": "c"}')
        opened = JsonLinesDocuments(path)
        assert [opened.read(index)["text"] for index in (2, 0, 1)] == ["c", "a", "é"]

    def test_an_empty_file_is_refused(self, tmp_path):
        with pytest.raises(DataError, match="holds no documents"):
            JsonLinesDocuments(self.write(tmp_path, "\n"))

    def test_a_file_that_ends_early_is_refused_at_once(self, tmp_path):
        path = self.write(tmp_path, '{"text": "a"}\n{"text": "b')
        with pytest.raises(
            DataError, match=r"document 2: not valid JSON .* the file may have been cut short"
        ):
            JsonLinesDocuments(path)

    def test_a_damaged_line_is_named_when_it_is_read(self, tmp_path):
        opened = JsonLinesDocuments(self.write(tmp_path, '{"text": "a"}\n[1]\n{"x\n{"text": "b"}\n'))
        with pytest.raises(DataError, match="document 2: expected a JSON object"):
            opened.read(1)
        with pytest.raises(DataError, match="document 3: not valid JSON"):
            opened.read(2)

    @pytest.mark.parametrize("change", ["grown", "gone"])
    def test_a_file_that_changed_is_told(self, tmp_path, change):
        path = self.write(tmp_path, '{"text": "a"}\n')
        opened = JsonLinesDocuments(path)
        if change == "grown":
            path.write_text('{"text": "a"}\n{"text": "b"}\n')
        else:
            path.unlink()
        with pytest.raises(DataError, match="has changed since|cannot be read"):
            opened.read(0)

    def test_equal_files_have_equal_digests(self, tmp_path):
        one = JsonLinesDocuments(self.write(tmp_path, '{"text": "a"}\n')).digest
        assert JsonLinesDocuments(self.write(tmp_path, '{"text": "a"}\n')).digest == one
        assert JsonLinesDocuments(self.write(tmp_path, '{"text": "b"}\n')).digest != one
