"""Text to batches: which files, which split, which rows, and what counting achieves on them."""

import math

import numpy as np
import pytest

from train.corpus import load_corpus, validation_names
from train.data import Windows, train_batches, validation_batches
from train.entropy import count_entropies


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def stream(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8)


def counting(length: int) -> np.ndarray:
    return np.arange(length, dtype=np.uint8)


def test_a_file_is_in_one_stream_and_ends_with_a_zero_byte(tmp_path):
    write(tmp_path, {"a.txt": b"one", "b/c.md": b"two", "d": "drei: ä".encode()})
    corpus = load_corpus(tmp_path)
    held_out = validation_names(["a.txt", "b/c.md", "d"])
    texts = {"a.txt": b"one\0", "b/c.md": b"two\0", "d": "drei: ä\0".encode()}
    for name, text in texts.items():
        assert (text in corpus.validation.tobytes()) == (name in held_out)
        assert (text in corpus.train.tobytes()) == (name not in held_out)
    assert len(corpus.train) + len(corpus.validation) == sum(map(len, texts.values()))


def test_what_is_not_text_is_listed_and_what_is_hidden_is_left_out(tmp_path):
    write(
        tmp_path,
        {
            "a.txt": b"one",
            "b.txt": b"two",
            "latin.txt": "é".encode("latin-1"),
            "zero.bin": b"a\0b",
            "empty": b"",
            ".git/config": b"hidden",
        },
    )
    corpus = load_corpus(tmp_path)
    assert corpus.num_files == 2
    assert corpus.skipped == ("latin.txt", "zero.bin")
    assert b"hidden" not in corpus.train.tobytes() + corpus.validation.tobytes()


def test_the_split_of_a_file_depends_on_its_path_alone():
    names = [f"folder/{i}.txt" for i in range(2000)]
    held_out = validation_names(names)
    assert len(held_out) == pytest.approx(100, abs=30)
    assert validation_names(names[::2]) == held_out & set(names[::2])


@pytest.mark.parametrize("number", [2, 3])
def test_few_files_leave_one_for_each_side(number):
    for first in range(50):
        names = [f"{first + i}.txt" for i in range(number)]
        assert 0 < len(validation_names(names)) < number


def test_the_default_text_is_the_running_pythons_library():
    corpus = load_corpus(None)
    assert corpus.num_files > 300
    assert len(corpus.validation) > 100_000
    assert b"class OrderedDict" in corpus.train.tobytes() + corpus.validation.tobytes()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "must be a folder"),
        ({}, "found 0, and 0 files that are not"),
        ({"a.bin": b"\xff\xfe"}, "found 0, and 1 files that are not"),
        ({"a.txt": b"text"}, "found 1"),
    ],
    ids=["missing", "empty", "binary", "one file"],
)
def test_a_folder_is_refused(tmp_path, files, message):
    folder = tmp_path / "data"
    if files is not None:
        folder.mkdir()
        write(folder, files)
    with pytest.raises(ValueError, match=message):
        load_corpus(folder)


def test_rows_share_one_byte_so_that_every_byte_is_a_target_once():
    rows = Windows(counting(12), 3)
    assert [rows[i].tolist() for i in range(len(rows))] == [
        [0, 1, 2, 3],
        [3, 4, 5, 6],
        [6, 7, 8, 9],
    ]


def test_an_epoch_holds_every_row_once_and_the_next_one_in_another_order():
    batches = train_batches(counting(3 * 8 + 1), seq_len=3, batch_size=2, seed=0)
    first, second = (np.concatenate([next(batches) for _ in range(4)])[:, 0] for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(0, 24, 3))
    assert list(first) != list(second)
    assert list(first) != sorted(first)


def test_the_order_depends_on_the_seed_alone():
    def order(seed):
        batches = train_batches(counting(101), seq_len=5, batch_size=3, seed=seed)
        return [next(batches).tolist() for _ in range(9)]

    assert order(1) == order(1) != order(2)


def test_an_iterator_continues_from_its_state():
    def batches():
        return train_batches(counting(101), seq_len=5, batch_size=3, seed=1)

    straight = batches()
    expected = [next(straight).tolist() for _ in range(11)]
    stopped = batches()
    for _ in range(8):
        next(stopped)
    resumed = batches()
    resumed.set_state(stopped.get_state())
    assert [next(resumed).tolist() for _ in range(3)] == expected[8:]


def test_validation_rows_are_spread_from_the_first_to_the_last():
    rows = validation_batches(counting(7 * 5 + 1), seq_len=5, batch_size=2, num_batches=2)
    assert rows[..., 0].tolist() == [[0, 10], [20, 30]]


def test_validation_takes_what_there_is():
    rows = validation_batches(counting(7 * 5 + 1), seq_len=5, batch_size=2, num_batches=9)
    assert rows.shape == (3, 2, 6)


@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("training", lambda s: train_batches(s, seq_len=5, batch_size=4, seed=0)),
        ("validation", lambda s: validation_batches(s, seq_len=5, batch_size=4, num_batches=1)),
    ],
)
def test_too_little_text_for_one_batch_is_refused(kind, make):
    make(counting(21))
    with pytest.raises(ValueError, match=f"the {kind} files hold 20 bytes.* need 21"):
        make(counting(20))


def test_entropies_of_a_text_small_enough_to_count_by_hand():
    # In "aab": a twice, b once, and after a once a and once b. Evaluated: b after a.
    entropies = count_entropies(stream(b"aab"), stream(b"ab")[None])
    p_b = (1 + 1) / (3 + 256)
    assert entropies.unigram == pytest.approx(-math.log2(p_b))
    assert entropies.bigram == pytest.approx(-math.log2((1 + p_b) / (2 + 1)))


def test_smoothed_probabilities_sum_to_one():
    text = stream(b"some text, and a byte that is never followed")
    everything = np.stack([np.full(256, ord("e")), np.arange(256)], axis=-1).astype(np.uint8)
    for name in ("unigram", "bigram"):
        bits = [getattr(count_entropies(text, row[None]), name) for row in everything]
        assert sum(2.0 ** -np.array(bits)) == pytest.approx(1)


def test_pairs_are_counted_across_chunks(monkeypatch):
    text = np.random.default_rng(0).integers(0, 5, 1009).astype(np.uint8)
    whole = count_entropies(text, text[None])
    monkeypatch.setattr("train.entropy._PAIRS_AT_ONCE", 7)
    assert count_entropies(text, text[None]) == whole
