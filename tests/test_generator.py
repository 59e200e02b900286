"""Generation: decoding equals one forward pass, whoever else is being decoded and in what cache."""

import dataclasses
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from models import (
    Generator,
    GeneratorConfig,
    HybridConfig,
    ModelCache,
    ModelConfig,
    Sampling,
    Transformer,
    load_pretrained,
)
from models.generate import Options, _Stream, main
from models.generate import run as write_on
from models.saved import SavedModel, Text, load_model
from tests.test_pretrained import DATA, ROOT
from tests.test_train_loop import run, settings, write_text

HYBRID = HybridConfig(dense_first=0, dense_every=3, block_size=16, local_blocks=2, vert_stride=3)
CONFIG = ModelConfig(
    vocab_size=31,
    num_layers=3,
    width=24,
    num_heads=6,
    num_kv_heads=3,
    mlp_width=20,
    attention=HYBRID,
)
LONGEST = 150
GREEDY = Sampling(temperature=0.0)


def make(config: ModelConfig = CONFIG) -> Transformer:
    return Transformer(config, rngs=nnx.Rngs(0))


def generator(config: ModelConfig = CONFIG, **changes) -> Generator:
    options = {"max_length": LONGEST, "rows": 3, "steps": 4} | changes
    return Generator(config, make(config), GeneratorConfig(**options))


def prompts(count: int, longest: int = 120) -> list[list[int]]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, longest + 1, size=count)
    return [rng.integers(0, CONFIG.vocab_size, size=n).tolist() for n in lengths]


PATTERNS = {
    "hybrid": HYBRID,
    "query heads": dataclasses.replace(HYBRID, heads="query"),
    "s2 and a window": dataclasses.replace(HYBRID, window=45),
    "window": HybridConfig(kind="window", dense_first=1, block_size=16, window=37),
}
ODD_CHUNKS = (37, 1, 1, 23, 1, 11, 23, 1)
CALLS = [
    *(pytest.param(attn, ODD_CHUNKS, "evicting", id=name) for name, attn in PATTERNS.items()),
    pytest.param(HYBRID, (1,) * 70, "evicting", id="token by token"),
    pytest.param(HYBRID, ODD_CHUNKS, "contiguous", id="contiguous"),
]


@pytest.mark.parametrize(("attention", "chunks", "kind"), CALLS)
def test_decoding_gives_the_logits_of_one_forward_pass(attention, chunks, kind):
    attention = dataclasses.replace(attention, dense_every=2)
    config = dataclasses.replace(CONFIG, num_layers=2, attention=attention)
    model = make(config)
    tokens = jax.random.randint(jax.random.key(1), (2, sum(chunks)), 0, config.vocab_size)
    expected = nnx.jit(model)(tokens)
    cache = ModelCache.create(config, batch=2, max_length=LONGEST, kind=kind)
    extend = nnx.jit(Transformer.extend, static_argnames="first")
    found, start = [], 0
    for chunk in chunks:
        x, cache = extend(model, tokens[:, start : start + chunk], cache, first=start == 0)
        found.append(model.logits(x))
        start += chunk
    assert cache.length.tolist() == [start, start]
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, rtol=2e-5, atol=2e-5)


def test_a_sparse_layer_keeps_less_and_a_dense_one_everything():
    cache = ModelCache.create(CONFIG, batch=1, max_length=16 * 60)
    sizes = [layer.key.nbytes for layer in cache.layers]
    assert [layer.paged for layer in cache.layers] == [True, True, False]
    # Of 60 blocks every third, two local ones of which one may be such a column, and one that a
    # block's end may still need.
    assert sizes[0] == sizes[1] == sizes[2] * 22 // 60
    contiguous = ModelCache.create(CONFIG, batch=1, max_length=16 * 60, kind="contiguous")
    assert {layer.key.nbytes for layer in contiguous.layers} == {sizes[2]}


def test_a_prefix_is_taken_in_once():
    """A cache is not changed: two texts go on from one."""
    model, (prefix, a, b) = make(), (jnp.asarray([tokens[:9]]) for tokens in prompts(40)[-3:])
    _, cache = model.extend(prefix, ModelCache.create(CONFIG, batch=1, max_length=40), first=True)
    for text in (a, b):
        x, _ = model.extend(text, cache)
        both = model.embeddings(jnp.concatenate([prefix, text], axis=1))
        expected = model.features(both)[:, -text.shape[1] :]
        np.testing.assert_allclose(x, expected, rtol=2e-5, atol=2e-5)


def test_the_cache_of_another_model_is_refused():
    model, tokens = make(), jnp.zeros((1, 3), jnp.int32)
    for change, message in (
        ({"num_layers": 2}, "one of 2 layers, the model has 3"),
        ({"attention": dataclasses.replace(HYBRID, vert_stride=4)}, "made for pattern="),
        ({"num_heads": 3}, "made for num_heads=3, not for 6"),
    ):
        other = dataclasses.replace(CONFIG, head_dim=4, **change)
        cache = ModelCache.create(other, batch=1, max_length=40)
        with pytest.raises(ValueError, match=message):
            model.extend(tokens, cache)


# Generating.


def test_greedy_generation_takes_the_likeliest_token_every_time():
    asked = prompts(7)
    results = generator().generate(asked, max_tokens=20, sampling=GREEDY)
    logits = nnx.jit(make())
    for prompt, result in zip(asked, results, strict=True):
        row = np.zeros((1, LONGEST), np.int32)
        row[0, : len(prompt) + 20] = prompt + result.tokens
        likeliest = np.asarray(logits(jnp.asarray(row))[0].argmax(axis=-1))
        assert likeliest[len(prompt) - 1 : len(prompt) + 19].tolist() == result.tokens
        assert result.reason == "length"


def test_two_hundred_ragged_prompts_in_batches_are_as_one_at_a_time():
    """They end at different steps, wait for rows and for pages, and come in by chunks."""
    asked, stop = prompts(200), (3, 5)
    drawn = {"max_tokens": 24, "sampling": Sampling(temperature=0.9), "stop": stop, "seed": 7}
    alone = generator(rows=1, cache="contiguous", steps=24).generate(asked, **drawn)
    together = generator(rows=7, pages=30, chunk=45, steps=3)
    assert together.pages_needed(LONGEST) * 7 > together.pages
    assert together.generate(asked, **drawn) == alone
    assert {result.reason for result in alone} == {"stop", "length"}
    assert len({len(result.tokens) for result in alone}) > 5
    for result in alone:
        assert not set(result.tokens[:-1]) & set(stop)
        assert (result.tokens[-1] in stop) == (result.reason == "stop")


def test_tokens_are_told_as_they_come():
    told: dict[int, list[int]] = {}
    results = generator().generate(
        prompts(5), max_tokens=9, on_tokens=lambda n, tokens: told.setdefault(n, []).extend(tokens)
    )
    assert [told[number] for number in range(5)] == [result.tokens for result in results]


def test_what_is_drawn_depends_on_the_seed_and_the_prompt():
    asked = [[4, 2]] * 3
    first, again, other = (
        [r.tokens for r in generator().generate(asked, max_tokens=20, seed=seed)]
        for seed in (5, 5, 6)
    )
    assert first == again != other
    assert first[0] != first[1] != first[2]


def test_a_bfloat16_model_generates():
    config = dataclasses.replace(CONFIG, dtype="bfloat16", num_kv_heads=2)
    [result] = generator(config).generate([[1, 2, 3]], max_tokens=5)
    assert len(result.tokens) == 5


@pytest.mark.parametrize(
    ("settings", "call", "message"),
    [
        ({}, {"prompts": [[1], []]}, "prompt 1 must be a row of at least one token"),
        ({}, {"prompts": [[[1]]]}, "prompt 0 must be a row of at least one token"),
        ({}, {"prompts": [[1, 31]]}, "prompt 0 has tokens from 1 to 31"),
        ({}, {"prompts": [[-1]]}, "prompt 0 has tokens from -1 to -1"),
        ({}, {"prompts": [[1] * 150]}, "prompt 0 has 150 tokens and max_tokens=1: more than"),
        ({}, {"max_tokens": 0}, "max_tokens=0 must be positive"),
        ({}, {"stop": [31]}, "from 0 to below 31"),
        ({"pages": 2}, {"prompts": [[1] * 60]}, "prompt 0 needs 4 pages, but there are pages=2"),
        ({"rows": 0}, {}, "rows=0 must be positive"),
        ({"chunk": 0}, {}, "chunk=0 must be positive"),
        ({"cache": "paged"}, {}, "cache='paged' must be evicting or contiguous"),
    ],
)
def test_generation_refuses(settings, call, message):
    with pytest.raises(ValueError, match=message):
        generator(**settings).generate(**{"prompts": [[1]], "max_tokens": 1} | call)


@pytest.mark.parametrize("seed", [-1, 1 << 32])
def test_a_seed_has_32_bits(seed):
    with pytest.raises(ValueError, match=f"seed={seed} must be from 0 to below"):
        generator().generate([[1]], max_tokens=1, seed=seed)


def test_stop_tokens_may_be_read_once():
    [result] = generator().generate([[1]], max_tokens=9, stop=iter(range(31)))
    assert len(result.tokens) == 1


def test_tokens_must_be_integers():
    with pytest.raises(TypeError, match="prompt 0 must hold integers, got float64"):
        generator().generate([[1.0]], max_tokens=1)


def test_a_model_that_gives_nan_says_so():
    model = make()
    model.norm.scale[...] = jnp.full((CONFIG.width,), jnp.nan)
    broken = Generator(CONFIG, model, GeneratorConfig(max_length=LONGEST))
    with pytest.raises(FloatingPointError, match="NaN after 0 tokens of prompt 0"):
        broken.generate([[1]], max_tokens=3)


def test_a_generator_refuses_what_its_model_does_not_have():
    with pytest.raises(ValueError, match="vocab_size=99 is not that of the model, 31"):
        Generator(dataclasses.replace(CONFIG, vocab_size=99), make())
    dense = dataclasses.replace(CONFIG, attention=HybridConfig(kind="dense"))
    with pytest.raises(ValueError, match="pages=9, but no layer evicts"):
        generator(dense, pages=9)
    with pytest.raises(ValueError, match="kind='evict' must be evicting or contiguous"):
        ModelCache.create(CONFIG, batch=1, max_length=9, kind="evict")
    with pytest.raises(TypeError, match="max_tokens=True must be an integer"):
        generator().generate([[1]], max_tokens=True)
    with pytest.raises(TypeError, match="cache must be a ModelCache, got NoneType"):
        make().extend(jnp.zeros((1, 1), jnp.int32), None)


@pytest.mark.parametrize("wrong", [{}, {"rows": 2}, "greedy", 0], ids=str)
def test_a_generator_names_settings_of_another_kind(wrong):
    kind = type(wrong).__name__
    with pytest.raises(TypeError, match=f"settings must be a GeneratorConfig, got {kind}"):
        Generator(CONFIG, make(), wrong)
    with pytest.raises(TypeError, match=f"sampling must be a Sampling, got {kind}"):
        generator().generate([[1]], max_tokens=1, sampling=wrong)
    with pytest.raises(TypeError, match=f"config must be a ModelConfig, got {kind}"):
        Generator(wrong, make())
    with pytest.raises(TypeError, match=f"model must be a Transformer, got {kind}"):
        Generator(CONFIG, wrong)


def test_no_prompts_give_no_results():
    assert generator().generate([], max_tokens=1) == []


# Models on disk.


def written(folder, capsys, **changes) -> str:
    options = {"max_tokens": 12, "generator": GeneratorConfig(max_length=64)} | changes
    write_on(Options(checkpoint=folder, **options))
    return capsys.readouterr().out


def test_a_trained_run_writes_on(tmp_path, capsys):
    config = settings(write_text(tmp_path / "text"), tmp_path / "run", steps=2)
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes integers and floats
        run(config)
    text = written(config.out, capsys, prompt=("3 bottles",), sampling=GREEDY)
    assert text.startswith("3 bottles")
    saved = load_model(config.out)
    [result] = Generator(saved.config, saved.model, GeneratorConfig(max_length=64)).generate(
        [list(b"3 bottles")], max_tokens=12, sampling=GREEDY
    )
    assert text == f"3 bottles{saved.text.decode(result.tokens)}\n"
    both = written(config.out, capsys, prompt=("3 bottles", "beer"), sampling=GREEDY)
    assert both.startswith(text.rstrip("\n"))
    assert "\nbeer" in both
    shutil.rmtree(config.out / "checkpoints")
    with pytest.raises(ValueError, match="holds no checkpoints"):
        load_model(config.out)


def test_an_imported_checkpoint_generates(tmp_path):
    config, model = load_pretrained(DATA / "mistral", dtype="float32")
    [result] = Generator(config, model, GeneratorConfig(max_length=90)).generate(
        [[5] * 60], max_tokens=20, sampling=GREEDY
    )
    row = jnp.asarray([[5] * 60 + result.tokens])
    assert nnx.jit(model)(row)[0, 59:79].argmax(axis=-1).tolist() == result.tokens
    shutil.copytree(DATA / "llama", tmp_path / "llama")
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        load_model(tmp_path / "llama")


def test_a_space_after_the_prompt_is_not_lost():
    """Decoders of Llama's kind strip the first space of what they are given."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "▁b": 1}, unk_token="a"))
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    text = Text(tokenizer, ())
    assert text.decode([1]) == "b"
    assert text.decode_after([0], [1, 1]) == " b b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "\udcff"], "prompt 0 is not UTF-8"),
        (["--seed", "-1"], "seed=-1 must be"),
        (["--checkpoint", "nowhere"], "nowhere holds no config.json: it must be the folder"),
    ],
)
def test_the_command_line_refuses(arguments, message, monkeypatch, capsys):
    given = ["generate", "--checkpoint", str(DATA / "llama"), *arguments]
    if "--prompt" in arguments:
        monkeypatch.setattr(
            "models.generate.load_model", lambda folder: SavedModel(CONFIG, make(), Text(None, ()))
        )
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_line(tmp_path):
    def call(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "models.generate", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = call("--checkpoint", str(tmp_path), "--prompt", "a")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "config.json" in done.stderr


def test_half_a_character_is_not_printed(capsys):
    stream, euro = _Stream(Text(None, (0,)), "$"), list("€!".encode())
    for token in euro[:2]:
        stream.add([token])
    assert capsys.readouterr().out == "$"
    stream.add(euro[2:])
    stream.add([0xE2], last=True)
    assert capsys.readouterr().out == "€!\ufffd"
