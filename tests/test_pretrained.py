"""Checkpoints of Hugging Face: logits against transformers, and folders that are refused."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import s2_jax
from models import HybridConfig, ModelConfig, Transformer, load_pretrained

ROOT = pathlib.Path(__file__).parents[1]
DATA = ROOT / "tests" / "data" / "pretrained"
NAMES = ["llama", "llama-tied", "mistral"]  # two shards of F32; BF16; F16
HYBRID = HybridConfig(dense_first=1, block_size=16, local_blocks=1, vert_stride=2)


def logits_of(model: Transformer, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(nnx.jit(model)(jnp.asarray(tokens)))


def check_logits(folder: pathlib.Path) -> None:
    _, model = load_pretrained(folder, dtype="float32")
    with np.load(folder / "logits.npz") as saved:
        tokens, expected = saved["tokens"], saved["logits"]
    assert np.abs(expected).max() > 4
    np.testing.assert_allclose(logits_of(model, tokens), expected, rtol=1e-5, atol=1e-4)


def copy(folder: pathlib.Path, name: str = "llama-tied") -> pathlib.Path:
    shutil.copytree(DATA / name, folder, dirs_exist_ok=True)
    return folder


def change_settings(folder: pathlib.Path, **changes) -> pathlib.Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def change_tensors(folder: pathlib.Path, **changes) -> pathlib.Path:
    """Replaces or adds tensors of a folder with one file; None takes one away."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): x for name, x in changes.items()}
    save_file({name: x for name, x in tensors.items() if x is not None}, path)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name):
    check_logits(DATA / name)


def test_matrices_can_be_stored_in_bfloat16():
    """As they are computed with: the same logits from half the memory."""
    both = [load_pretrained(DATA / "llama", param_dtype=x) for x in ("float32", "bfloat16")]
    (_, wide), (config, narrow) = both
    assert config.param_dtype == "bfloat16"
    kinds = {(x.ndim > 1, str(x.dtype)) for x in jax.tree.leaves(nnx.state(narrow, nnx.Param))}
    assert kinds == {(True, "bfloat16"), (False, "float32")}
    made = {
        (x.ndim > 1, str(x.dtype))
        for x in jax.tree.leaves(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))
    }
    assert made == kinds
    tokens = np.arange(20)[None]
    np.testing.assert_array_equal(logits_of(wide, tokens), logits_of(narrow, tokens))


if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
    # The committed logits are compared anywhere; these are made anew.
    def test_logits_are_those_of_the_transformers_that_is_installed(tmp_path):
        command = [sys.executable, "-m", "tests.make_pretrained", str(tmp_path)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        for name in NAMES:
            check_logits(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", HybridConfig(kind="dense")),
        ("mistral", HybridConfig(kind="window", dense_first=0, window=5)),
    ],
)
def test_without_another_one_a_checkpoint_keeps_its_own_attention(name, expected):
    config, model = load_pretrained(DATA / name)
    assert config.attention == expected
    assert tuple(block.attention.pattern for block in model.blocks) == config.patterns()


def test_the_settings_are_those_of_the_file():
    config, model = load_pretrained(DATA / "llama-tied", attention=HYBRID, dtype="float32")
    assert config == ModelConfig(
        vocab_size=41,
        num_layers=2,
        width=24,
        num_heads=6,
        num_kv_heads=2,
        head_dim=10,
        mlp_width=19,
        norm_epsilon=0.01,
        tie_embeddings=True,
        rope_base=10_000.0,
        attention=HYBRID,
    )
    fresh = Transformer(config, rngs=nnx.Rngs(0))
    assert nnx.graphdef(model) == nnx.graphdef(fresh)
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model))} == {jnp.float32.dtype}


def test_another_attention_changes_what_layers_see_and_no_parameter():
    tokens = np.arange(2 * 40).reshape(2, 40) % 41
    _, dense = load_pretrained(DATA / "llama", dtype="float32")
    _, hybrid = load_pretrained(DATA / "llama", attention=HYBRID, dtype="float32")
    assert hybrid.blocks[1].attention.pattern == s2_jax.local_stride(1, 2, block_size=16)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(dense), nnx.state(hybrid))
    difference = np.abs(logits_of(dense, tokens) - logits_of(hybrid, tokens)).max(axis=(0, 2))
    assert difference[:16].max() < 1e-4  # the first block sees itself in either
    assert difference[16:].max() > 0.1


def test_an_attention_that_hides_nothing_changes_no_logit():
    tokens = np.arange(2 * 40).reshape(2, 40) % 41
    everything = HybridConfig(dense_first=0, block_size=16, local_blocks=1, vert_stride=1)
    _, dense = load_pretrained(DATA / "llama", dtype="float32")
    _, hybrid = load_pretrained(DATA / "llama", attention=everything, dtype="float32")
    expected = logits_of(dense, tokens)
    np.testing.assert_allclose(logits_of(hybrid, tokens), expected, rtol=1e-5, atol=1e-4)


def test_by_default_bfloat16_is_computed_in():
    config, model = load_pretrained(DATA / "llama")
    assert config.dtype == "bfloat16"
    assert model.embeddings(jnp.asarray([[1]])).dtype == jnp.bfloat16


def test_the_settings_that_transformers_4_writes(tmp_path):
    expected, _ = load_pretrained(DATA / "llama-tied")
    folder = copy(tmp_path)
    change_settings(folder, rope_parameters=None, rope_theta=10_000.0, rope_scaling=None)
    assert load_pretrained(folder)[0] == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}, "rope_theta": 5.0}, 7e4),
        ({"rope_parameters": None, "rope_scaling": {"type": "default", "rope_theta": 7e4}}, 7e4),
        ({"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"rope_theta": 7e4}}, 7e4),
        ({"rope_parameters": {"rope_theta": 7e4}, "rope_scaling": {}}, 7e4),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7e4}, 7e4),
    ],
)
def test_the_rotary_base_is_that_which_transformers_takes(tmp_path, settings, expected):
    """From rope_scaling before rope_parameters, and from inside before outside."""
    folder = change_settings(copy(tmp_path), **settings)
    assert load_pretrained(folder)[0].rope_base == expected


@pytest.mark.parametrize(
    ("name", "left_out", "field", "expected"),
    [
        ("llama", "head_dim", "head_dim", 4),
        ("llama", "rms_norm_eps", "norm_epsilon", 1e-6),
        ("llama", "rope_parameters", "rope_base", 10_000.0),
        ("llama", "tie_word_embeddings", "tie_embeddings", False),
        ("mistral", "sliding_window", "attention", HybridConfig("window", 0, window=4096)),
    ],
)
def test_what_the_settings_leave_out_is_what_transformers_takes(
    tmp_path, name, left_out, field, expected
):
    path = copy(tmp_path, name) / "config.json"
    settings = json.loads(path.read_text())
    del settings[left_out]
    path.write_text(json.dumps(settings))
    assert getattr(load_pretrained(tmp_path)[0], field) == expected


def test_a_mistral_without_a_window_is_dense(tmp_path):
    folder = change_settings(copy(tmp_path, "mistral"), sliding_window=None)
    assert load_pretrained(folder)[0].attention == HybridConfig(kind="dense")


def test_what_old_checkpoints_hold_besides_is_passed_over(tmp_path):
    embedding = load_file(DATA / "llama-tied" / "model.safetensors")["model.embed_tokens.weight"]
    frequencies = {"model__layers__0__self_attn__rotary_emb__inv_freq": np.ones(5, np.float32)}
    folder = change_tensors(copy(tmp_path), lm_head__weight=embedding, **frequencies)
    check_logits(folder)


def test_a_tied_head_must_be_the_embedding(tmp_path):
    folder = change_tensors(copy(tmp_path), lm_head__weight=np.ones((41, 24), np.float32))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported, only llama and mistral"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types=.* is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling=.*linear.* is not"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters=.*llama3.* is not"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor.* is not"),
        ({"rope_parameters": {"rope_type": ["llama3"]}}, "rope_parameters=.*llama3.* is not"),
        ({"rope_scaling": {"type": {}}}, "rope_scaling=.* is not"),
        ({"rope_scaling": {"rope_theta": "big"}}, "a number for rope_theta, got 'big'"),
        ({"rope_parameters": {"rope_theta": "big"}}, "a number for rope_theta, got 'big'"),
        ({"rms_norm_eps": None}, "a number for rms_norm_eps, got None"),
        ({"hidden_size": None}, "a positive integer hidden_size, got None"),
        ({"vocab_size": 41.5}, "a positive integer vocab_size, got 41.5"),
        ({"num_hidden_layers": 0}, "a positive integer num_hidden_layers, got 0"),
        ({"num_attention_heads": 5}, "num_heads=5 must be a multiple of num_kv_heads=2"),
        ({"head_dim": 3}, "head_dim=3 must be positive and even"),
    ],
)
def test_settings_that_are_refused(tmp_path, change, message):
    folder = change_settings(copy(tmp_path), **change)
    with pytest.raises(ValueError, match=rf"config\.json.*{message}|^{message}"):
        load_pretrained(folder)


def test_an_attention_that_is_refused():
    with pytest.raises(TypeError, match="attention='dense' must be a HybridConfig, as Hybrid"):
        load_pretrained(DATA / "llama", attention="dense")
    with pytest.raises(TypeError, match="attention=None must be a HybridConfig"):
        ModelConfig(attention=None)


def test_a_file_for_a_folder_is_refused():
    with pytest.raises(ValueError, match=r"model\.safetensors must be a folder with config\.json"):
        load_pretrained(DATA / "llama-tied" / "model.safetensors")


def test_a_dtype_that_is_refused():
    with pytest.raises(ValueError, match="dtype='float16' must be one of float32, bfloat16"):
        load_pretrained(DATA / "llama", dtype="float16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__norm__weight": None}, r"missing tensors: model\.norm\.weight$"),
        ({"model__norm__bias": np.ones(24, np.float32)}, r"unknown tensors: model\.norm\.bias$"),
        (
            {"model__norm__weight": np.ones(23, np.float32)},
            r"wrong shapes: model\.norm\.weight \(23,\) instead of \(24,\)$",
        ),
        (
            {"model__layers__1__self_attn__k_proj__weight": np.ones((24, 20), np.float32)},
            r"k_proj\.weight \(24, 20\) instead of \(20, 24\)$",
        ),
        (
            {"model__norm__weight": np.ones(24, np.int8)},
            r"dtypes other than BF16, F16 and F32: model\.norm\.weight I8$",
        ),
    ],
)
def test_tensors_that_are_refused(tmp_path, change, message):
    folder = change_tensors(copy(tmp_path), **change)
    with pytest.raises(ValueError, match=rf"does not fit its config\.json: .*{message}"):
        load_pretrained(folder)


def test_every_problem_is_named_and_long_lists_are_cut(tmp_path):
    folder = change_settings(copy(tmp_path), num_hidden_layers=4, vocab_size=43)
    change_tensors(folder, extra=np.ones(3, np.float32))
    message = r"missing tensors: (model\.layers\.2\.\S+, ){7}.* and 10 more; unknown tensors: extra"
    with pytest.raises(ValueError, match=message + r"; wrong shapes: \S+ \(41, 24\)"):
        load_pretrained(folder)


def test_files_that_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json does not exist"):
        load_pretrained(tmp_path / "nowhere")
    folder = copy(tmp_path)
    (folder / "model.safetensors").write_bytes(b"\x00" * 30)
    with pytest.raises(ValueError, match=r"model\.safetensors is not a safetensors file"):
        load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors does not exist"):
        load_pretrained(folder)
    for text, message in (("{", "is not JSON"), ("[]", "must hold a JSON object, got list")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config\.json {message}"):
            load_pretrained(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (None, "must have a weight_map"),
        ({"model.norm.weight": 3}, "must have a weight_map"),
        ({"model.norm.weight": "../a.safetensors"}, "names '../a.safetensors', which is not"),
        ({"model.norm.weight": "absent.safetensors"}, r"absent\.safetensors does not exist"),
        (
            {"model.norm.weight": "model-00001-of-00002.safetensors"},
            r"names tensors that are not there: model\.norm\.weight",
        ),
        ({"lm_head.weight": "model-00002-of-00002.safetensors"}, "missing tensors: .* and 5 more"),
    ],
)
def test_an_index_that_is_refused(tmp_path, weight_map, message):
    folder = copy(tmp_path, "llama")
    index = {} if weight_map is None else {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)
