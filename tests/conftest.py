import gc
import os

import jax
import pytest
from hypothesis import Phase, settings


def pytest_configure(config):
    """Eight simulated devices; on a CPU also what compiles small programs fastest."""
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    if "not gpu" in config.getoption("markexpr"):
        flags.append("--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1")
        if jax.__version_info__ < (0, 11):  # later ones have this way of compiling no more
            flags.append("--xla_cpu_use_fusion_emitters=false")  # twice as fast
    else:
        flags.append("--xla_gpu_autotune_level=0")
    os.environ["XLA_FLAGS"] = " ".join(flags)


# Tracing makes many objects that live on: looking for garbage among them takes a tenth of the time.
gc.set_threshold(20_000, 50, 100)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def register(name, max_examples):
    """Every example compiles, so that shrinking one would take minutes; "deep" does."""
    settings.register_profile(
        name,
        max_examples=max_examples,
        deadline=None,
        derandomize=True,
        print_blob=True,
        phases=(Phase.explicit, Phase.generate),
    )


register("default", 2)
register("gpu", 10)
settings.register_profile("deep", max_examples=80, deadline=None, print_blob=True)
settings.load_profile("default")  # --hypothesis-profile comes after this


@pytest.fixture(
    params=[
        "reference",
        "interpret",
        pytest.param("triton", marks=pytest.mark.gpu),
        pytest.param("jax_triton", marks=pytest.mark.gpu),
    ],
)
def implementation(request):
    """Every implementation goes through the same suite; the GPU's with `-m gpu`."""
    return request.param


@pytest.fixture(
    params=[
        "interpret",
        pytest.param("triton", marks=pytest.mark.gpu),
        pytest.param("jax_triton", marks=pytest.mark.gpu),
    ],
)
def kernels(request):
    """The same, for what only kernels do."""
    return request.param
