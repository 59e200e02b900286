"""Documents to rows: every token once, segments, alignment, resuming, hosts, and both sources."""

import dataclasses
import json

import numpy as np
import pytest

from train.batches import load_batches
from train.config import ReportConfig, TrainConfig
from train.data import load_data
from train.packing import Rows, train_rows, validation_rows
from train.plan import packed_plan, whole_plan
from train.prepare import PrepareConfig, prepare
from train.shards import Split
from train.step import target_mask

LENGTHS = np.random.default_rng(0).integers(1, 101, 211)


def split_of(lengths, shard_tokens=97):
    """Document d is the tokens 1000 d + 1, 1000 d + 2, ..."""
    tokens = np.concatenate([1000 * d + 1 + np.arange(n) for d, n in enumerate(lengths)])
    shards = tuple(
        tokens[i : i + shard_tokens].astype("<u4") for i in range(0, len(tokens), shard_tokens)
    )
    return Split(shards, np.concatenate([[0], np.cumsum(lengths)]), num_bytes=len(tokens))


def rows_of(lengths=LENGTHS, seq_len=30, **settings):
    return Rows(split_of(lengths), seq_len, **settings)


def segments(batch):
    """Of every row, its pieces as (column, tokens); fails where ids are not 1, 2, ... in order."""
    for tokens, ids in zip(batch["tokens"], batch["segment_ids"]):
        assert not tokens[ids == 0].any()
        numbers = np.unique(ids[ids > 0])
        assert numbers.tolist() == list(range(1, len(numbers) + 1))
        pieces = [(int(np.argmax(ids == n)), tokens[ids == n]) for n in numbers]
        assert [column for column, _ in pieces] == sorted(column for column, _ in pieces)
        yield pieces


def epoch_of(rows, seed=0, epoch=0):
    plan = rows.plan(seed, epoch)
    return rows.read(plan, np.arange(len(plan)))


def take(batches, number):
    return [next(batches) for _ in range(number)]


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(a[name], b[name])
        for a, b in zip(first, second)
        for name in ("tokens", "segment_ids")
    )


def test_a_small_plan_drawn_by_hand():
    # Rows of 8: document 1 is longer than one, what is left of it joins document 0, and so on.
    rows = rows_of([3, 10, 4, 2], seq_len=7)
    batch = rows.read(rows.plan_in_order(), np.arange(3))
    assert batch["tokens"].tolist() == [
        [1001, 1002, 1003, 1004, 1005, 1006, 1007, 1008],
        [1, 2, 3, 1009, 1010, 3001, 3002, 0],
        [2001, 2002, 2003, 2004, 0, 0, 0, 0],
    ]
    assert batch["segment_ids"].tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 2, 2, 3, 3, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
    ]
    assert {values.dtype for values in batch.values()} == {np.dtype(np.int32)}


@pytest.mark.parametrize("align", [1, 4, 7, 30])
def test_an_epoch_of_packed_rows_has_every_token_once(align):
    rows = rows_of(align=align)
    pieces = [piece for row in segments(epoch_of(rows)) for piece in row]
    seen = np.sort(np.concatenate([tokens for _, tokens in pieces]))
    everything = rows.split.tokens(0, rows.split.num_tokens)
    assert np.array_equal(seen, everything)
    assert all(column % align == 0 for column, _ in pieces)
    assert all((np.diff(tokens) == 1).all() for _, tokens in pieces)  # one document, in order


def test_only_a_document_longer_than_a_row_is_cut():
    row = 31
    pieces: dict[int, list[int]] = {}
    for found in segments(epoch_of(rows_of(seq_len=row - 1))):
        for _, tokens in found:
            pieces.setdefault(int(tokens[0]) // 1000, []).append(len(tokens))
    for document, length in enumerate(LENGTHS.tolist()):
        rest = [length % row] if length % row else []
        assert sorted(pieces[document]) == sorted([row] * (length // row) + rest)


def test_packed_rows_are_nearly_full():
    plan = packed_plan(LENGTHS, 128, rng=np.random.default_rng(0))
    assert LENGTHS.sum() / (128 * len(plan)) > 0.95


def test_rows_stay_few_where_many_cannot_be_open(monkeypatch):
    monkeypatch.setattr("train.plan._OPEN_ROWS", 3)
    plan = packed_plan(LENGTHS, 128)
    assert plan.length.sum() == LENGTHS.sum()
    assert len(plan) < 1.2 * LENGTHS.sum() / 128


def test_an_epoch_of_whole_rows_has_as_many_as_the_long_documents_fill():
    rows = rows_of(packing="whole")
    batch = epoch_of(rows)
    assert (batch["segment_ids"] == 1).all()
    assert (np.diff(batch["tokens"]) == 1).all()
    documents, counts = np.unique(batch["tokens"][:, 0] // 1000, return_counts=True)
    assert dict(zip(documents.tolist(), counts.tolist())) == {
        d: n // 31 for d, n in enumerate(LENGTHS.tolist()) if n >= 31
    }
    assert len(np.unique(batch["tokens"])) == batch["tokens"].size
    assert len({int(start) % 1000 for start in batch["tokens"][:, 0]}) > 31  # offsets are drawn


def test_a_document_of_exactly_a_row_is_one_whole_row():
    plan = whole_plan(np.array([30, 31, 32]), 31, rng=np.random.default_rng(0))
    assert sorted(plan.document.tolist()) == [1, 2]
    assert len(whole_plan(np.array([30]), 31)) == 0


@pytest.mark.parametrize("packing", ["packed", "whole"])
def test_rows_of_a_long_document_are_spread_over_the_epoch(packing):
    rows = rows_of([31 * 20, 31 * 20], packing=packing)
    starts = epoch_of(rows)["tokens"][:, 0]
    assert len(starts) == 40
    assert (np.diff(starts) == 31).sum() < 10


@pytest.mark.parametrize("packing", ["packed", "whole"])
def test_the_order_is_a_function_of_seed_and_epoch(packing):
    rows = rows_of(packing=packing)
    first, again = epoch_of(rows, 1, 2), epoch_of(rows, 1, 2)
    assert same([first], [again])
    for seed, epoch in ((1, 3), (2, 2)):
        assert not same([first], [epoch_of(rows, seed, epoch)])


@pytest.mark.parametrize("packing", ["packed", "whole"])
def test_batches_go_through_the_epochs_without_a_gap(packing):
    rows = rows_of(packing=packing)
    epochs = [epoch_of(rows, 5, e)["tokens"] for e in range(3)]
    batches = take(train_rows(rows, batch_size=7, seed=5), sum(map(len, epochs[:2])) // 7 + 1)
    seen = np.concatenate([batch["tokens"] for batch in batches])
    assert np.array_equal(seen, np.concatenate(epochs)[: len(seen)])


@pytest.mark.parametrize("packing", ["packed", "whole"])
@pytest.mark.parametrize("stop", [0, 3, 17, 53])
def test_batches_continue_from_their_state_bit_for_bit(packing, stop):
    rows = rows_of(packing=packing)
    expected = take(train_rows(rows, batch_size=8, seed=3), stop + 20)
    stopped = train_rows(rows, batch_size=8, seed=3)
    take(stopped, stop)
    state = json.loads(json.dumps(stopped.get_state()))
    resumed = train_rows(rows, batch_size=8, seed=3)
    take(resumed, 2)
    resumed.set_state(state)
    assert same(take(resumed, 20), expected[stop:])
    assert state["epoch"] >= (1 if stop == 53 else 0)


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_hosts_share_the_batches_of_one(hosts):
    rows = rows_of()
    alone = take(train_rows(rows, batch_size=8, seed=0), 30)  # over the end of two epochs
    shares = [
        take(train_rows(rows, batch_size=8, seed=0, shard_index=i, num_shards=hosts), 30)
        for i in range(hosts)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares)
    ]
    assert same(joined, alone)


def test_another_number_of_hosts_continues():
    rows = rows_of()
    alone = train_rows(rows, batch_size=8, seed=0)
    take(alone, 5)
    second = train_rows(rows, batch_size=8, seed=0, shard_index=1, num_shards=2)
    second.set_state(alone.get_state())
    assert np.array_equal(next(alone)["tokens"][4:], next(second)["tokens"])


def test_validation_rows_are_fixed_and_spread_over_all():
    rows = rows_of([31] * 10)
    batch = validation_rows(rows, batch_size=2, num_batches=2)
    assert batch["tokens"].shape == batch["segment_ids"].shape == (2, 2, 31)
    assert (batch["tokens"][..., 0] // 1000).tolist() == [[0, 3], [6, 9]]
    assert validation_rows(rows, batch_size=3, num_batches=99)["tokens"].shape == (3, 3, 31)
    alone = validation_rows(rows, batch_size=4, num_batches=2)
    second = validation_rows(rows, batch_size=4, num_batches=2, shard_index=1, num_shards=2)
    assert np.array_equal(second["tokens"], alone["tokens"][:, 2:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"training documents fill 1 rows of seq_len \+ 1 = 64 .* hold 9 in all"),
        ({"packing": "whole"}, "fill 0 rows .* too few for one batch of 2; the longest .* has 5"),
    ],
)
def test_a_corpus_smaller_than_a_row_is_refused(settings, message):
    rows = rows_of([5, 4], seq_len=63, **settings)
    with pytest.raises(ValueError, match=message):
        train_rows(rows, batch_size=2, seed=0)
    with pytest.raises(ValueError, match=message.replace("training", "validation")):
        validation_rows(rows, batch_size=2, num_batches=1)


def test_a_corpus_smaller_than_a_row_is_one_padded_row():
    (row,) = segments(next(train_rows(rows_of([5, 4], seq_len=63), batch_size=1, seed=0)))
    assert sorted(len(tokens) for _, tokens in row) == [4, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"align": 0}, "align=0 must be from 1 to seq_len=30"),
        ({"align": 31}, "align=31"),
        ({"align": 2, "packing": "whole"}, "align=2 goes with packing='packed' only"),
    ],
)
def test_rows_refuse(settings, message):
    with pytest.raises(ValueError, match=message):
        rows_of(**settings)


@pytest.mark.parametrize(("index", "number"), [(0, 3), (2, 2), (-1, 2)])
def test_hosts_that_cannot_share_a_batch_are_refused(index, number):
    with pytest.raises(ValueError, match=f"num_shards={number}, and shard_index={index}"):
        train_rows(rows_of(), batch_size=8, seed=0, shard_index=index, num_shards=number)


def test_targets_are_in_the_document_of_the_token_before():
    ids = np.array([[1, 1, 2, 2, 2, 0, 0], [1, 0, 0, 2, 3, 3, 3]])
    assert target_mask(ids).astype(int).tolist() == [[1, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"document {i} " * (10 + i))
    return folder


def config_of(data, **changes):
    return TrainConfig(
        **{"data": data, "batch_size": 4, "seq_len": 32, "report": ReportConfig(eval_batches=2)}
        | changes
    )


def test_both_sources_give_one_kind_of_batch(texts, tmp_path):
    prepare(PrepareConfig(str(texts), tmp_path / "shards"))
    for data in (texts, tmp_path / "shards"):
        batches = load_batches(config_of(data))
        batch = next(batches.train)
        assert batch["tokens"].shape == (4, 33)
        assert batch["tokens"].dtype == np.int32
        assert batches.validation["tokens"].shape == (2, 4, 33)
        assert "document" in batches.tokenizer.decode(batch["tokens"][0])
        assert batches.bytes_per_token == pytest.approx(1, abs=0.01)
        assert ("segment_ids" in batch) == ("segment_ids" in batches.validation)
        assert ("segment_ids" in batch) == (data != texts)
        state = json.loads(json.dumps(batches.train.get_state()))
        expected = next(batches.train)["tokens"]
        resumed = load_batches(config_of(data)).train
        resumed.set_state(state)
        assert np.array_equal(next(resumed)["tokens"], expected)
        host = load_batches(config_of(data), shard_index=1, num_shards=2)
        assert np.array_equal(next(host.train)["tokens"], batch["tokens"][2:])
        assert np.array_equal(host.validation["tokens"], batches.validation["tokens"][:, 2:])


def test_batches_of_bytes_are_those_of_the_plain_pipeline(texts):
    config = config_of(texts)
    plain, batches = load_data(config), load_batches(config)
    assert np.array_equal(next(batches.train)["tokens"], next(plain.train).astype(np.int32))
    assert batches.fingerprint == plain.corpus.fingerprint


def test_the_model_must_have_the_vocabulary_of_the_shards(texts, tmp_path):
    shards = tmp_path / "shards"
    prepare(PrepareConfig(str(texts), shards, tokenizer="bpe", vocab_size=280))
    with pytest.raises(ValueError, match=r"vocab_size=256 of the model .* vocab_size=280 of"):
        load_batches(config_of(shards))
    model = dataclasses.replace(TrainConfig().model, vocab_size=280)
    batches = load_batches(config_of(shards, model=model, packing="packed", align=16))
    assert batches.bytes_per_token > 1.5
    with pytest.raises(ValueError, match="vocab_size=280 must be 256"):
        config_of(texts, model=model)


def test_what_goes_with_prepared_text_only_is_refused_for_bytes(texts):
    for change in ({"packing": "whole"}, {"align": 16}):
        with pytest.raises(ValueError, match="go with prepared data only"):
            load_batches(config_of(texts, **change))
