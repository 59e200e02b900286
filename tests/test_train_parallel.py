"""One run, however it is shared out: meshes, pmap, parts of a batch."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models import HybridConfig, ModelConfig, Transformer, transformer
from train import step
from train.config import MeshConfig, OptimizerConfig, TrainConfig
from train.parallel import check_devices, make_program
from train.sharding import make_mesh, shardings
from train.step import abstract_state, make_optimizer, make_state, summed_loss, train_step

MODEL = ModelConfig(
    num_layers=2, width=16, num_heads=4, num_kv_heads=2, mlp_width=24,
    attention=HybridConfig(dense_first=1, block_size=16, local_blocks=1, vert_stride=2),
)  # fmt: skip
CONFIG = TrainConfig(
    steps=20, batch_size=8, seq_len=39, model=MODEL, optimizer=OptimizerConfig(learning_rate=0.01)
)
EIGHT = MeshConfig(data=2, fsdp=2, tensor=2)


@pytest.fixture(autouse=True)
def standard_dtypes():
    with jax.numpy_dtype_promotion("standard"):
        yield


def program_of(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    check_devices(config)
    return make_program(config, make_optimizer(config.optimizer, config.steps))


def losses(**changes):
    """Of 20 steps, and the last state."""
    program = program_of(**changes)
    rng, state, found = np.random.default_rng(0), program.init(0), []
    for _ in range(CONFIG.steps):
        batch = rng.integers(97, 123, (CONFIG.batch_size, CONFIG.seq_len + 1)).astype(np.int32)
        # Documents of other lengths in every row, and padding.
        ids = np.sort(rng.integers(0, 4, batch.shape)).astype(np.int32)
        state, metrics = program.train_step(state, {"tokens": batch, "segment_ids": ids})
        found.append(float(metrics.loss))
    return found, program.collect(state)


@pytest.fixture(scope="module", name="alone")
def on_one_device():
    with jax.numpy_dtype_promotion("standard"):
        return losses()


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh": EIGHT},
        {"mesh": MeshConfig(fsdp=8)},
        {"parallel": "pmap"},
        {"mesh": MeshConfig(data=2, tensor=2), "accumulate": 2},
    ],
    ids=str,
)
def test_sharing_out_changes_rounding_alone(alone, changes):
    shared = losses(**changes)
    np.testing.assert_allclose(shared[0], alone[0], rtol=1e-5)
    assert alone[0][-1] < alone[0][0] - 0.3
    for a, b in zip(jax.tree.leaves(shared[1]), jax.tree.leaves(alone[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_logits_of_long_rows_are_made_in_parts(monkeypatch):
    graphdef, _ = abstract_state(MODEL, optax.sgd(0.1))
    params = jax.jit(make_state(MODEL, optax.sgd(0.1)))(jax.random.key(0)).params
    rng = np.random.default_rng(0)
    batch = {"tokens": rng.integers(0, 256, (2, 61)).astype(np.int32)}
    batch["segment_ids"] = np.sort(rng.integers(0, 4, (2, 61))).astype(np.int32)

    def run():
        loss = lambda p: summed_loss(graphdef, p, batch)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    whole = run()
    monkeypatch.setattr(step, "_LOGITS_AT_ONCE", 16)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(run()), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)


def test_parameters_and_moments_are_split_by_rule():
    state = program_of(mesh=EIGHT).init(0)
    by_name = {
        jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(state)[0]
    }
    split = {name: x for name, x in by_name.items() if not x.sharding.is_fully_replicated}
    matrices = {name for name, x in by_name.items() if x.ndim > 1}
    assert split.keys() == matrices
    assert any("mu" in name for name in split)
    assert any("nu" in name for name in split)
    for name, x in split.items():
        assert x.addressable_shards[0].data.size * 4 == x.size, name
    [query] = [x for name, x in by_name.items() if re.search(r"params.*0.*'query'", name)]
    assert query.addressable_shards[0].data.shape == (8, 2, 4)  # half the width, half the heads


def test_tokens_are_shared_out_between_products():
    """Over the axis tensor the residual stream lies split by tokens, all else by heads or units.

    Half of the rows is exchanged at a time.
    """
    config = dataclasses.replace(CONFIG, seq_len=40, mesh=MeshConfig(tensor=2))
    optimizer = make_optimizer(config.optimizer, config.steps)
    graphdef, like = abstract_state(MODEL, optimizer)
    mesh = make_mesh(config.mesh)
    lie = shardings(mesh, like)
    like = jax.tree.map(
        lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), like, lie
    )
    one = partial(train_step, graphdef=graphdef, optimizer=optimizer)
    batch = {"tokens": jax.ShapeDtypeStruct((8, 41), np.int32)}
    with jax.set_mesh(mesh):
        compiled = jax.jit(one, out_shardings=(lie, None)).lower(like, batch).compile()
    text = compiled.as_text()
    assert "all-to-all" not in text  # what is split by heads stays so
    norms = [line for line in text.splitlines() if "rsqrt(" in line and "f32[4," in line]
    assert norms
    assert all("f32[4,20" in line for line in norms)  # half of the 40 tokens


def test_a_step_keeps_the_state_where_it_is():
    program = program_of(mesh=EIGHT)
    state = program.init(0)
    before = [x.sharding for x in jax.tree.leaves(state)]
    state, _ = program.train_step(state, {"tokens": np.zeros((8, 41), np.int32)})
    assert before == [x.sharding for x in jax.tree.leaves(state)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshConfig(data=16)}, "16 devices are more than the 8"),
        ({"mesh": MeshConfig(data=3)}, "batch_size=8 must be a multiple of 3: mesh.data=3 times"),
        ({"accumulate": 3}, "batch_size=8 must be a multiple of 3: .* accumulate=3"),
        ({"mesh": MeshConfig(tensor=4)}, "num_kv_heads=2 must be a multiple of mesh.tensor=4"),
        (
            {"mesh": MeshConfig(fsdp=4), "model": dataclasses.replace(MODEL, width=24)},
            None,
        ),
        (
            {"mesh": MeshConfig(tensor=2), "model": dataclasses.replace(MODEL, mlp_width=9)},
            "mlp_width=9 must be a multiple of mesh.tensor=2",
        ),
        ({"mesh": EIGHT, "parallel": "pmap"}, "mesh is for parallel='jit'"),
        ({"parallel": "pmap", "accumulate": 2}, "8 devices that pmap uses times accumulate=2"),
    ],
    ids=str,
)
def test_what_cannot_be_shared_out_is_refused(changes, message):
    config = dataclasses.replace(CONFIG, **changes)
    if message is None:
        check_devices(config)
        return
    with pytest.raises(ValueError, match=message):
        check_devices(config)


def test_over_tensor_the_stream_after_attention_is_kept(monkeypatch):
    """Recomputed, it would be exchanged again, in each half of the rows."""

    def products():
        model = dataclasses.replace(MODEL, remat="attention")
        optimizer = make_optimizer(CONFIG.optimizer, CONFIG.steps)
        graphdef, like = abstract_state(model, optimizer)
        one = partial(train_step, graphdef=graphdef, optimizer=optimizer)
        batch = {"tokens": jax.ShapeDtypeStruct((8, 41), np.int32)}
        with jax.set_mesh(make_mesh(MeshConfig(tensor=2))):
            return str(jax.make_jaxpr(one)(like, batch)).count("dot_general[")

    kept = products()
    monkeypatch.setattr(transformer, "_KEEP_STREAM_TOO", transformer._KEEP_ATTENTION)
    assert products() - kept == 2 * MODEL.num_layers  # the output projections


@pytest.mark.parametrize(("batch", "length"), [(5, 32), (7, 32), (4, 31)])
def test_what_devices_cannot_share_out_evenly(batch, length):
    """The model over such a mesh computes what it does on one device, gradients included."""
    graphdef, params = nnx.split(Transformer(MODEL, rngs=nnx.Rngs(0)))
    ids = jax.random.randint(jax.random.key(0), (batch, length), 0, 256)

    def loss(params, ids):
        logits = nnx.merge(graphdef, params)(ids)
        return (jax.nn.log_softmax(logits)[..., 1] * jnp.arange(length)[None]).mean()

    expected = jax.jit(jax.grad(loss))(params, ids)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2))):
        found = jax.jit(jax.grad(loss))(jax.device_get(params), jax.device_get(ids))
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-6 * largest, rtol=1e-4)
