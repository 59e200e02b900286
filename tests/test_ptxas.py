"""What CUDA's ptxas makes of Mosaic's kernels: `make ptxas` runs it, without a GPU.

JAX's CUDA plugin compiles for a GPU that it is told of (`S2_CUDA_PLUGIN` names the folder that it
was unpacked in); ptxas is that of the package triton.
"""

import dataclasses
import os
import pathlib
import re

import jax
import pytest

from pallas_kernels import hopper_keys, hopper_tiles, lowering, tiles
from tests.test_mosaic import CALLS, ONE

pytestmark = pytest.mark.ptxas
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 10 patch: 2 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 } core_count: 132 fpus_per_core: 128
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 62914560
  memory_bandwidth: 4800000000000 device_memory_size: 150000000000 clock_rate_ghz: 1.98
}
"""
MOST_SPILLED = 160  # bytes a thread


@pytest.fixture(scope="module")
def device():
    """An H200 that is not there."""
    import triton

    folder = pathlib.Path(os.environ["S2_CUDA_PLUGIN"])
    found = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    os.environ["PATH"] = f"{found}{os.pathsep}{os.environ['PATH']}"
    runtime = folder / "jax_cuda13_plugin/libmosaic_gpu_runtime.so"
    os.environ["MOSAIC_GPU_RUNTIME_LIB_PATH"] = str(runtime)
    from jax._src.lib import _jax, xla_client

    library = folder / "jax_plugins/xla_cuda13/xla_cuda_plugin.so"
    api = xla_client.load_pjrt_plugin_dynamically("cuda", str(library))
    xla_client.initialize_pjrt_plugin("cuda")
    options = {"target_config": H200, "topology": "1x1x1"}
    return _jax.get_c_api_topology(api, "", options)._make_compile_only_devices()[0]


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    """Where Mosaic writes down what ptxas says, a file a kernel."""
    folder = tmp_path_factory.mktemp("messages")
    os.environ |= {"MOSAIC_GPU_DUMP_TO": str(folder), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    return folder


@pytest.mark.parametrize(
    "name",
    [
        *("groups", "head-dim-128", "float16", "blocks-of-32", "one-group"),
        *("packed", "padded-by-all-three", "window-joins", "one-backward"),
    ],
)
def test_products_are_not_serialized_and_registers_suffice(name, device, messages, monkeypatch):
    call = dataclasses.replace(CALLS["head-dim-128"], tiles=ONE)
    if name != "one-backward":
        call = CALLS[name]
    monkeypatch.setattr(tiles, "LEAST_MOSAIC_ROWS", dict.fromkeys(tiles.LEAST_MOSAIC_ROWS, 1))
    monkeypatch.setattr(lowering, "target_platform", lambda: "cuda")
    monkeypatch.setattr(lowering, "compute_capability", lambda: 90)
    monkeypatch.setattr(lowering, "compiler_errs", lambda: False)
    for module in (hopper_tiles, hopper_keys):
        monkeypatch.setattr(module, "multiprocessors", lambda: 132)
    before = set(messages.glob("*.ptxas"))
    with jax.default_device(device):
        call.staged("mosaic").lower(lowering_platforms=("cuda",)).compile()
    made = set(messages.glob("*.ptxas")) - before
    two = call.tiles is ONE or (call.query_lengths and call.tiles is None)
    assert len(made) == (2 if two else 3)
    for path in made:
        text = path.read_text()
        assert "serialized" not in text, path.name
        [spilled] = re.findall(r"(\d+) bytes spill stores,.* spill loads\n", text)[-1:]
        assert int(spilled) <= MOST_SPILLED, path.name
