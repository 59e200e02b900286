"""Training shared out over two GPUs is the training of one; `-m multi_gpu`."""

import jax
import numpy as np
import pytest

from models import HybridConfig, ModelConfig
from train.config import MeshConfig, OptimizerConfig, TrainConfig
from train.parallel import check_devices, make_program
from train.step import make_optimizer

pytestmark = pytest.mark.multi_gpu

STEPS = 20
MODEL = ModelConfig(
    num_layers=2, width=64, num_heads=4, num_kv_heads=2, mlp_width=88,
    attention=HybridConfig(dense_first=1, block_size=16, local_blocks=2, vert_stride=4),
)  # fmt: skip
WAYS = {
    "pmap": {"parallel": "pmap"},
    "data": {"mesh": MeshConfig(data=2)},
    "fsdp": {"mesh": MeshConfig(fsdp=2)},
    "tensor": {"mesh": MeshConfig(tensor=2)},
}


@pytest.fixture(autouse=True)
def whole_float32_products():
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        yield


def losses(**shared):
    config = TrainConfig(
        steps=STEPS, batch_size=4, seq_len=331, model=MODEL,
        optimizer=OptimizerConfig(learning_rate=0.01), **shared,
    )  # fmt: skip
    check_devices(config)
    program = make_program(config, make_optimizer(config.optimizer, STEPS))
    state, rng, found = program.init(0), np.random.default_rng(0), []
    for _ in range(STEPS):
        tokens = rng.integers(97, 123, (config.batch_size, config.seq_len + 1)).astype(np.int32)
        ids = np.sort(rng.integers(0, 4, tokens.shape)).astype(np.int32)
        state, metrics = program.train_step(state, {"tokens": tokens, "segment_ids": ids})
        found.append(float(metrics.loss))
    return found


@pytest.fixture(scope="module", name="alone")
def on_one_gpu():
    assert jax.local_device_count() == 2, f"these tests need two GPUs, found {jax.devices()}"
    with jax.default_matmul_precision("highest"), jax.numpy_dtype_promotion("standard"):
        return losses()


@pytest.mark.parametrize("way", WAYS)
def test_two_gpus_change_rounding_alone(alone, way):
    np.testing.assert_allclose(losses(**WAYS[way]), alone, rtol=1e-5)
    assert alone[-1] < alone[0] - 0.3
