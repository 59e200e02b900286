"""What is hidden stands where it should, once, and the answer is at the end."""

import numpy as np
import pytest

from models.tokenizer import ByteTokenizer, TextTokenizer, train_bpe
from train.retrieval import Haystack, associative_recall, multi_needle, passkey

TEXT = "".join(f"Line {i} of a long and boring text, with {i * i} in it.\n" for i in range(900))
TASKS = {"passkey": passkey, "multi-needle": multi_needle, "recall": associative_recall}


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def haystack(request):
    bpe = request.param == "bpe"
    tokenizer = TextTokenizer(train_bpe([TEXT], 400)) if bpe else ByteTokenizer()
    return Haystack(tokenizer.encode([TEXT])[0], tokenizer)


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def positions(tokens, wanted):
    return [
        i
        for i in range(len(tokens) - len(wanted) + 1)
        if np.array_equal(tokens[i : i + len(wanted)], wanted)
    ]


@pytest.mark.parametrize("length", [1024, 4096, 8191])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_the_answer_is_hidden_once_and_stands_at_the_end(haystack, task, length, depth):
    example = task(haystack, length=length, depth=depth, seed=7)
    answer = example.tokens[example.answer]
    assert example.tokens.shape == (length,)
    assert example.tokens.dtype == np.int32
    assert example.answer.stop == length
    assert positions(example.tokens, answer) == [example.hidden.start, example.answer.start]
    assert np.array_equal(example.tokens[example.hidden], answer)
    text = haystack.tokenizer.decode(example.tokens)
    value = haystack.tokenizer.decode(answer)
    assert text.count(value) == 2
    assert text.endswith(value)
    assert np.flatnonzero(example.loss_mask).tolist() == list(
        range(example.answer.start, example.answer.stop)
    )


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_depth_is_the_share_of_the_text_before_it(haystack, depth):
    example = passkey(haystack, length=4096, depth=depth, seed=1)
    before = haystack.encode("\nThe pass key is")
    fact = len(before) + len(haystack.encode(". Remember it.\n"))
    question = len(haystack.encode("\nWhat is the pass key? The pass key is"))
    value = example.answer.stop - example.answer.start
    fill = 4096 - fact - question - 2 * value
    assert example.hidden.start - len(before) == round(depth * fill)


@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_others_shift_what_is_asked_for_by_little(haystack, task, depth):
    example = task(haystack, length=8192, depth=depth, seed=2)
    assert example.hidden.start / 8192 == pytest.approx(depth, abs=0.05)


def test_an_example_is_a_function_of_its_arguments(haystack, task):
    def example(**changes):
        arguments = {"length": 2048, "depth": 0.5, "seed": 3} | changes
        return task(haystack, **arguments).tokens.tolist()

    assert example() == example()
    assert len({tuple(example(seed=seed)) for seed in range(5)}) == 5
    assert example(depth=0.6) != example()


def test_the_question_is_for_one_of_several(haystack):
    for seed in range(5):
        example = multi_needle(haystack, length=2048, depth=0.5, seed=seed, needles=6)
        text = haystack.tokenizer.decode(example.tokens)
        assert text.count("\nThe number of ") == 6
        asked = text.rpartition("What is the number of ")[2].partition("?")[0]
        value = haystack.tokenizer.decode(example.tokens[example.answer])
        assert f"\nThe number of {asked} is{value}.\n" in text


def test_pairs_stand_together_and_any_of_them_is_asked_for(haystack):
    asked = set()
    for seed in range(12):
        example = associative_recall(haystack, length=2048, depth=0.5, seed=seed, pairs=4)
        text = haystack.tokenizer.decode(example.tokens)
        name = text.rpartition("\n")[2].partition(" =")[0]
        value = haystack.tokenizer.decode(example.tokens[example.answer])
        assert f"\n{name} ={value};" in text
        table = [line for line in text.split("\n") if " = " in line and ";" in line]
        assert len(table) == 4
        asked.add(next(i for i, line in enumerate(table) if line.startswith(f"{name} =")))
    assert len(asked) > 1


def test_a_number_that_the_text_has_already_is_drawn_anew(haystack, monkeypatch):
    numbers = iter([" 17", " 1234567"])
    monkeypatch.setattr("train.retrieval._number", lambda rng: next(numbers))
    example = passkey(haystack, length=len(haystack.tokens), depth=0.5, seed=0)
    assert haystack.tokenizer.decode(example.tokens[example.answer]) == " 1234567"


def test_a_text_that_has_every_number_is_refused(haystack, monkeypatch):
    monkeypatch.setattr("train.retrieval._number", lambda rng: " 17")
    with pytest.raises(ValueError, match="100 numbers in turn are in the text"):
        passkey(haystack, length=len(haystack.tokens), depth=0.5, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 1.1}, "depth=1.1 must be a share"),
        ({"depth": float("nan")}, "depth=nan"),
        ({"length": 10}, "length=10 must be from"),
        ({"length": 10**6}, "length=1000000 must be from"),
    ],
)
def test_what_cannot_be_built_is_refused(haystack, task, change, message):
    with pytest.raises(ValueError, match=message):
        task(haystack, **{"length": 2048, "depth": 0.5, "seed": 0} | change)


@pytest.mark.parametrize(
    ("task", "name"), [(multi_needle, "needles"), (associative_recall, "pairs")]
)
@pytest.mark.parametrize("number", [0, 17])
def test_counts_are_refused(haystack, task, name, number):
    with pytest.raises(ValueError, match=f"{name}={number} must be from 1 to 16"):
        task(haystack, length=2048, depth=0.5, seed=0, **{name: number})


def test_the_shortest_and_the_longest_example_that_fit(haystack):
    with pytest.raises(ValueError) as refused:
        passkey(haystack, length=1, depth=0.5, seed=0)
    words = str(refused.value).replace(",", "").split()
    shortest = int(words[words.index("from") + 1])
    assert len(passkey(haystack, length=shortest, depth=0.5, seed=0).tokens) == shortest
    longest = shortest + len(haystack.tokens)
    assert len(passkey(haystack, length=longest, depth=0.5, seed=0).tokens) == longest
