import os

import jax
import pytest
from hypothesis import Phase, settings


def pytest_configure(config):
    """Eight simulated devices; on a CPU also less optimisation, which compiles twice as fast."""
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
    if "not gpu" in config.getoption("markexpr"):
        flags.append("--xla_backend_optimization_level=0")
    else:
        flags.append("--xla_gpu_autotune_level=0")
    os.environ["XLA_FLAGS"] = " ".join(flags)


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


register("default", 5)
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
