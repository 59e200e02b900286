"""The launcher "jax_triton" as far as a machine without a GPU can see; `-m gpu` runs the suite."""

import re
import zlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec, use_abstract_mesh

import s2_jax
from pallas_kernels import kernel_call, lowering
from pallas_kernels.official import Binary, compile_kernel
from pallas_kernels.triton_ir import KernelIR

KERNELS = ("s2_attention_forward", "s2_attention_dq", "s2_attention_dkv")
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
A100 = AbstractDevice(device_kind="NVIDIA A100-SXM4-80GB", num_cores=108, platform="cuda")
SHAPE = jax.ShapeDtypeStruct((2, 256, 4, 64), "bfloat16")


def attend(*arrays, **options):
    return s2_jax.s2_attention(
        *arrays, s2_jax.local_stride(2, 3), implementation="jax_triton", **options
    )


def lower(attend, device=H100, devices=1):
    """The program of `attend` and its gradients, on a mesh."""
    mesh = AbstractMesh((devices,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    with use_abstract_mesh(mesh):
        run = jax.grad(lambda *a: attend(*a).astype(jnp.float32).sum(), argnums=(0, 1, 2))
        return jax.jit(run).trace(SHAPE, SHAPE, SHAPE).lower(lowering_platforms=("cuda",))


def calls(lowered):
    """Names of the kernels called and what is handed to jaxlib for each."""
    text = lowered.as_text()
    found = re.findall(r'@triton_kernel_call_ffi.*?name = "(\w+)", opaque = "([^"]*)"', text)
    unescape = re.compile(rb"\\([0-9A-F]{2}|\\)")

    def data(escaped):
        plain = unescape.sub(
            lambda m: b"\\" if m[1] == b"\\" else bytes([int(m[1], 16)]), escaped.encode()
        )
        return zlib.decompress(plain)

    return {name: data(escaped) for name, escaped in found}


@pytest.mark.compile
@pytest.mark.parametrize(("device", "target"), [(H100, "sm_90a"), (A100, "sm_80")])
def test_kernels_are_compiled_into_the_program_without_a_gpu(device, target):
    found = calls(lower(attend, device))
    assert tuple(found) == KERNELS
    for name, message in found.items():
        assert f".target {target}".encode() in message
        assert f".visible .entry {name}(".encode() in message
        assert b"\x7fELF" in message, "the machine code"


@pytest.mark.compile
def test_compiling_again_gives_the_same_program():
    """So that JAX's compilation cache finds it."""
    first = lower(attend).as_text()
    compile_kernel.cache_clear()
    assert lower(attend).as_text() == first


@pytest.mark.compile
def test_kernels_inside_shard_map():
    heads = PartitionSpec(None, None, "x")
    split = jax.shard_map(
        lambda *a: attend(*a, head_axis="x"), in_specs=heads, out_specs=heads, check_vma=True
    )
    assert tuple(calls(lower(split, devices=2))) == KERNELS


def test_the_message_is_the_one_jaxlib_writes():
    """Written by jaxlib's CUDA plugin: the same bytes in 0.10.2, 0.11.2 and 0.12.0.1."""
    kernel = KernelIR("user", "", (2, 70000, 1), num_warps=4, num_stages=2, operands=3)
    binary = Binary("name", "PTX", b"", shared_bytes=98304, scratch_bytes=0)
    assert kernel_call.message(kernel, binary, 90) == bytes.fromhex(
        "0a310a150a046e616d651004188080062203505458305a5001100218f0a20420012a040a0210102a040a0210"
        "102a040a021010220475736572"
    )


@pytest.mark.parametrize(("pointers", "scratch"), [(4, 0), (6, 0), (5, 128)])
def test_another_calling_convention_is_refused(pointers, scratch):
    ptx = ", ".join(f"name_param_{i}" for i in range(pointers)) + ")\n name_param_0"
    kernel = KernelIR("name", "", (1, 1, 1), num_warps=4, num_stages=2, operands=3)
    with pytest.raises(NotImplementedError, match="another triton is needed"):
        kernel_call.opaque(kernel, Binary("name", ptx, b"", 0, scratch), 90)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(lowering, "missing_packages", lambda: ["jax-triton", "triton"])
    with pytest.raises(ValueError, match=r"jax-triton and triton: pip install 's2-jax\[triton\]'"):
        lower(attend)


@pytest.mark.compile
def test_kernels_under_vmap():
    found = calls(lower(lambda *a: jax.vmap(attend)(*(x[:, None] for x in a))))
    assert tuple(found) == KERNELS


@pytest.mark.gpu
def test_jaxlib_reads_the_message():
    import jaxlib.gpu_triton

    kernel = KernelIR("user", "", (2, 70000, 1), num_warps=4, num_stages=2, operands=3)
    message = kernel_call.message(kernel, Binary("name", "PTX", b"\x00ELF", 98304, 0), 90)
    metadata = bytes([3 << 3 | 2, 2]) + b"ok"
    read = jaxlib.gpu_triton.get_serialized_metadata(zlib.compress(message + metadata))
    assert read == b"ok"
