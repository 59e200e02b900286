"""Text to shards and back: which documents, which split, which tokens, and what is refused."""

import json

import numpy as np
import pytest
import tokenizers

from models.tokenizer import END_TOKEN, TextTokenizer, train_bpe
from train.corpus import validation_names
from train.documents import find_documents, split_documents
from train.prepare import PrepareConfig, main, prepare
from train.shards import fingerprint, open_shards
from train.summary import summary

WORDS = ("alpha", "beta", "gamma", "delta", "Straße", "日本", "\n", "    ")


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def prose(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def texts(number: int = 30) -> dict[str, str]:
    return {f"{'abc'[i % 3]}/{i:02}.txt": prose(i, 11 * i + 1) for i in range(number)}


def shards_of(tmp_path, files, **settings):
    source = write(tmp_path / "source", files)
    prepare(PrepareConfig(str(source), tmp_path / "out", **settings))
    return open_shards(tmp_path / "out")


def decoded(shards, split):
    documents = getattr(shards, split)
    tokens = [documents.document(i) for i in range(len(documents))]
    assert all(t[-1] == shards.tokenizer.end_token for t in tokens)
    assert all(shards.tokenizer.end_token not in t[:-1] for t in tokens)
    return [shards.tokenizer.decode(t[:-1]) for t in tokens]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe", "file"])
@pytest.mark.parametrize("shard_tokens", [61, 1 << 20])
def test_every_document_comes_back_from_the_split_of_its_name(tmp_path, tokenizer, shard_tokens):
    settings = {"tokenizer": tokenizer}
    if tokenizer == "bpe":
        settings["vocab_size"] = 300
    if tokenizer == "file":
        settings["tokenizer"] = str(tmp_path / "tokenizer.json")
        (tmp_path / "tokenizer.json").write_text(train_bpe([prose(0, 500)], 280))
    files = texts()
    shards = shards_of(tmp_path, files, shard_tokens=shard_tokens, **settings)
    held_out = validation_names(list(files))
    assert decoded(shards, "train") == [files[n] for n in sorted(files) if n not in held_out]
    assert decoded(shards, "validation") == [files[n] for n in sorted(files) if n in held_out]
    assert shards.vocab_size == {"bytes": 256, "bpe": 300, "file": 280}[tokenizer]
    assert max(map(len, shards.train.shards)) <= shard_tokens
    assert shards.train.num_bytes == sum(len(t.encode()) for t in decoded(shards, "train"))


def test_a_long_document_is_tokenised_in_pieces_that_join(tmp_path, monkeypatch):
    monkeypatch.setattr("train.documents._PIECE_BYTES", 7)
    monkeypatch.setattr("train.prepare._BATCH_CHARACTERS", 20)
    files = {"a": prose(0, 400), "b": "日本" * 50, "c": "\n\n" * 9 + "x" * 30, "d": "é"}
    for tokenizer in ("bytes", "bpe"):
        shards = shards_of(tmp_path / tokenizer, files, tokenizer=tokenizer)
        assert sorted(decoded(shards, "train") + decoded(shards, "validation")) == sorted(
            files.values()
        )


def test_a_vocabulary_of_more_than_16_bits_takes_32(tmp_path):
    vocab = {chr(0x4E00 + i % 20000) + chr(0x61 + i // 20000): i + 1 for i in range(70_000)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, **vocab}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END_TOKEN])
    tokenizer.save(str(tmp_path / "words.json"))
    last = list(vocab)[-1]
    shards = shards_of(
        tmp_path, {"a": last, "b": last + " "}, tokenizer=str(tmp_path / "words.json")
    )
    assert shards.train.document(0).tolist() == [70_000, 70_001]
    assert shards.train.shards[0].dtype == np.dtype("<u4")


def test_a_text_that_spells_the_end_token_does_not_end(tmp_path):
    files = {"a": f"one {END_TOKEN} two", "b": f"{END_TOKEN}{END_TOKEN}", "c": "three"}
    shards = shards_of(tmp_path, files, tokenizer="bpe", vocab_size=270)
    assert sorted(decoded(shards, "train") + decoded(shards, "validation")) == sorted(
        files.values()
    )


def test_padding_and_truncation_of_a_tokenizer_are_not_applied():
    tokenizer = tokenizers.Tokenizer.from_str(train_bpe(["some text"], 257))
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    long, short = TextTokenizer(tokenizer.to_str()).encode(["a text of many bytes", "ab"])
    assert (len(long), len(short)) == (20, 2)


def test_a_bpe_is_trained_on_the_training_split_alone(tmp_path):
    names = [f"{i}.txt" for i in range(20)]
    held_out = validation_names(names)
    files = {name: "zqzq " * 50 + name if name in held_out else "abab " + name for name in names}
    shards = shards_of(tmp_path, files, tokenizer="bpe", vocab_size=400)
    assert len(shards.tokenizer.encode(["abab"])[0]) < len(shards.tokenizer.encode(["zqzq"])[0])


def test_folders_are_documents_down_to_a_depth(tmp_path):
    source = write(
        tmp_path,
        {"top": "0", "a/1": "1", "a/2": "2\n", "a/b/3": "3", "a/b/c/4": "4", "d/.git/5": "5"},
    )

    def found(depth):
        documents = find_documents(str(source), depth).documents
        return {document.name: "".join(document.pieces()) for document in documents}

    assert found(1) == {"./": "0\n", "a/": "1\n2\n3\n4\n"}
    assert found(2) == {"./": "0\n", "a/": "1\n2\n", "a/b/": "3\n4\n"}
    assert found(9) == {"./": "0\n", "a/": "1\n2\n", "a/b/": "3\n", "a/b/c/": "4\n"}
    assert found(None)["a/2"] == "2\n"
    assert len(found(None)) == 5


def test_a_pattern_finds_what_it_says(tmp_path):
    write(tmp_path / "src", {"a.c": "1", "b/c.c": "2", "b/c.h": "3", ".d/e.c": "4", "f.bin": b"\0"})
    found = find_documents(f"{tmp_path}/src/**/*.c")
    assert [document.name for document in found.documents] == ["a.c", "b/c.c"]
    assert found.source == "src/**/*.c"
    assert find_documents(f"{tmp_path}/src/f.*").skipped == ("f.bin",)


def test_a_name_need_not_be_utf8(tmp_path):
    source = write(tmp_path / "source", {"a": "one", "b": "two"})
    (source / "c\udcff.txt").write_text("three")
    prepared = prepare(PrepareConfig(str(source), tmp_path / "out"))
    assert sum(map(len, prepared.lengths.values())) == 3
    summary(prepared)


def test_folders_are_held_out_whole(tmp_path):
    files = {f"{i}/{j}": f"{i} {j}" for i in range(9) for j in range(5)}
    documents = find_documents(str(write(tmp_path, files))).documents
    split = split_documents(documents, "folder")
    sides = [{document.top_folder for document in side} for side in (split.train, split.validation)]
    assert sides[1] == validation_names([str(i) for i in range(9)])
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("by", ["document", "folder"])
def test_equal_texts_are_on_one_side(tmp_path, by):
    files = {f"{i}/{j}": f"text {(i * 7 + j) % 13}" for i in range(20) for j in range(5)}
    documents = find_documents(str(write(tmp_path, files))).documents
    split = split_documents(documents, by)
    train, validation = ({d.digest for d in side} for side in (split.train, split.validation))
    assert not train & validation
    assert train
    assert validation
    assert split.duplicates == 100 - 13
    assert split.moved > 0
    assert len(split.train) + len(split.validation) == 100


def test_what_is_written_depends_on_the_text_alone(tmp_path):
    first, second = (
        shards_of(tmp_path / name, texts(), tokenizer="bpe", vocab_size=300) for name in "ab"
    )
    assert first.fingerprint == second.fingerprint
    (tmp_path / "a/source/a/00.txt").write_text("changed")
    prepare(PrepareConfig(str(tmp_path / "a/source"), tmp_path / "changed"))
    prepare(PrepareConfig(str(tmp_path / "b/source"), tmp_path / "unchanged"))
    assert (
        open_shards(tmp_path / "changed").fingerprint
        != open_shards(tmp_path / "unchanged").fingerprint
    )
    assert str(tmp_path) not in (tmp_path / "changed/shards.json").read_text()


def test_a_text_that_changes_while_it_is_read_is_refused(tmp_path):
    source = write(tmp_path, {"a": "one"})
    (document,) = find_documents(str(source)).documents
    write(tmp_path, {"a": "two"})
    with pytest.raises(ValueError, match="'a' changed while"):
        list(document.pieces())


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        (None, {}, "must be a folder, or a pattern"),
        ({}, {}, "at least two different text documents.* found 0"),
        ({"a": "one"}, {}, "found 1"),
        ({"a": "one", "b": "one"}, {}, "found 1"),
        ({"a": b"\xff", "b": b"a\0b", "c": ""}, {}, "found 0"),
        ({"a/b": "one", "a/c": "two"}, {"split_by": "folder"}, "two top folders.* found 1"),
        ({"a": "one", "b": "two"}, {"tokenizer": "nowhere.json"}, "must be bytes, bpe or"),
    ],
    ids=["missing", "empty", "one", "equal", "binary", "one folder", "no tokenizer"],
)
def test_a_source_is_refused(tmp_path, files, settings, message):
    if files is not None:
        (tmp_path / "source").mkdir()
        write(tmp_path / "source", files)
    with pytest.raises(ValueError, match=message):
        prepare(PrepareConfig(str(tmp_path / "source"), tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"document_per_folder": 0}, "document_per_folder=0"),
        ({"shard_tokens": 0}, "shard_tokens=0"),
        ({"vocab_size": 500}, "vocab_size=500 goes with"),
        ({"vocab_size": 256, "tokenizer": "bpe"}, "vocab_size=256 must be at least 257"),
        ({"end_token": "</s>"}, "end_token='</s>' goes with"),
    ],
)
def test_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig("source", tmp_path, **settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "not a tokenizer.json"), (train_bpe(["a"], 257), "'</s>' must be a special token")],
    ids=["no tokenizer", "no end token"],
)
def test_a_tokenizer_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        TextTokenizer(text, "</s>")


def test_an_output_folder_that_holds_something_is_refused_and_left_alone(tmp_path):
    source = write(tmp_path / "source", texts(3))
    write(tmp_path / "out", {"note": "mine"})
    with pytest.raises(ValueError, match="must be a new or an empty folder"):
        prepare(PrepareConfig(str(source), tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["note"]


@pytest.mark.parametrize("pattern", ["", "**", "**/*.json"])
def test_shards_are_not_written_into_their_own_source(tmp_path, pattern):
    source = str(write(tmp_path / "source", texts(3)) / pattern)
    out = tmp_path / "source" / "a" / "out"
    with pytest.raises(ValueError, match=r"lies in source=.*: what is written there would be"):
        prepare(PrepareConfig(source, out))
    assert not out.exists()


def test_shards_may_lie_where_a_pattern_finds_none_of_them(tmp_path):
    source, out = write(tmp_path / "source", texts(3)), tmp_path / "source" / "out"
    for name in ("first", "second"):
        prepare(PrepareConfig(f"{source}/**/*.txt", out / name))
    first, second = (open_shards(out / name) for name in ("first", "second"))
    assert first.fingerprint == second.fingerprint


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def edit(folder, **changes):
    path = folder / "shards.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda out: (out / "shards.json").unlink(), "holds no shards.json"),
        (lambda out: (out / "shards.json").write_text("["), "does not describe shards"),
        (lambda out: edit(out, version=99), "has version 99 .* reads 1"),
        (lambda out: edit(out, vocab_size=999), "has been changed"),
        (lambda out: cut(out / "train-00001.bin"), "train-00001.bin' has .* bytes and must have"),
        (lambda out: (out / "train-00000.bin").unlink(), "train-00000.bin' is missing"),
        (lambda out: cut(out / "train-00000.idx.npy"), "idx.npy' is not the file"),
        (lambda out: (out / "validation-00000.idx.npy").unlink(), "idx.npy' is missing"),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json' is missing"),
        (
            lambda out: (out / "tokenizer.json").write_text(train_bpe(["other"], 260)),
            "tokenizer.json' is not the file that the shards were written with",
        ),
    ],
    ids=[
        *("unfinished", "no json", "version", "edited", "cut", "no tokens"),
        *("index cut", "no index", "no tokenizer", "other tokenizer"),
    ],
)
def test_damaged_shards_are_refused(tmp_path, damage, message):
    shards_of(tmp_path, texts(), tokenizer="bpe", vocab_size=300, shard_tokens=400)
    damage(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        open_shards(tmp_path / "out")


def test_a_document_of_no_such_number_is_an_index_error(tmp_path):
    shards = shards_of(tmp_path, texts(3))
    for index in (-1, len(shards.train)):
        with pytest.raises(IndexError, match=f"index={index}"):
            shards.train.document(index)


def test_the_fingerprint_covers_the_tokens(tmp_path):
    manifest = json.loads((shards_of(tmp_path, texts(3)).folder / "shards.json").read_text())
    before = fingerprint(manifest)
    manifest["splits"]["train"]["shards"][0]["sha256"] = "other"
    assert fingerprint(manifest) != before == manifest["fingerprint"]


def test_the_command_prints_a_summary_or_says_why_not(monkeypatch, capsys, tmp_path):
    source = write(tmp_path / "source", {**texts(), "copy": prose(1, 12), "x.bin": b"\0"})
    line = ["prepare", "--source", str(source), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", line)
    main()
    printed = capsys.readouterr().out
    for words in (
        "train",
        "validation",
        "bytes/token",
        "> 128k",
        "29.txt",
        "1 files",
        "duplicates",
    ):
        assert words in printed
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "must be a new or an empty folder" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["prepare", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "--document-per-folder DEPTH" in capsys.readouterr().out
