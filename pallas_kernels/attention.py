"""Block-sparse attention with gradients: the one name that the library calls."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.backward import all_three, dkv, dq
from pallas_kernels.call import Arrays, Settings
from pallas_kernels.forward import forward
from pallas_kernels.lowering import vary_alike
from pallas_kernels.partition import KernelCall
from pallas_kernels.softmax import LOG2_E
from pallas_kernels.tokens import Tokens

Attention = Callable[..., tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Portable:
    """Kernels where a call is lowered for CUDA, and `fallback` where it is lowered otherwise.

    fallback(query, key, value, tokens) -> (out, lse); None where the kernels must run.
    pattern_of_head: which list each head of the whole call walks.
    """

    settings: Settings
    pattern_of_head: tuple[int, ...]
    fallback: Attention | None = None

    def arrays(self, inputs: tuple[jax.Array, ...], tokens: Tokens) -> Arrays:
        """What every kernel takes, by name."""
        numbers = jnp.asarray(self.pattern_of_head, jnp.int32)[tokens.head_index]
        named = dict(zip(("query", "key", "value"), inputs, strict=True))
        fields = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
        del fields["head_index"]
        named |= {name: array for name, array in fields.items() if array is not None}
        return named | {"pattern_of_head": numbers}


def _forward(static: Portable, *args: Any) -> tuple[jax.Array, jax.Array]:
    """Output and LSE in log2."""

    def kernels(*args: Any) -> tuple[jax.Array, jax.Array]:
        call = KernelCall(forward, static.settings, ("out", "lse"))
        lists = static.settings.layouts.forward().arrays
        out, lse = call(static.arrays(args[:3], args[3]), lists)
        return out, lse

    if static.fallback is None:
        return kernels(*args)
    fallback = static.fallback

    def elsewhere(*args: Any) -> tuple[jax.Array, jax.Array]:
        out, lse = fallback(*args)
        return out, lse * LOG2_E

    return lax.platform_dependent(*args, cuda=kernels, default=elsewhere)


def _forward_rule(static: Portable, *args: Any) -> Any:
    out, lse = _forward(static, *args)
    out = checkpoint_name(out, "s2_attention_out")
    lse = checkpoint_name(lse, "s2_attention_lse")
    return (out, lse / LOG2_E), (args, out, lse)


def _backward_rule(static: Portable, residuals: Any, grads: tuple[jax.Array, jax.Array]) -> Any:
    (query, key, value, tokens), out, lse = residuals
    fallback, settings = static.fallback, static.settings

    def kernels(*operands: Any) -> tuple[jax.Array, ...]:
        inputs, tokens, out, lse, (grad_out, grad_lse) = operands
        unseeing = jnp.isneginf(lse)
        delta = jnp.sum(out.astype(jnp.float32) * grad_out.astype(jnp.float32), axis=-1)
        delta = jnp.where(unseeing, 0.0, jnp.swapaxes(delta, 1, 2) - grad_lse)
        arrays = static.arrays(inputs, tokens) | {"grad_out": grad_out, "delta": delta}
        arrays["lse"] = jnp.where(unseeing, jnp.inf, lse)
        results: tuple[str, ...] = "query", "key", "value"
        kernel: Any = all_three
        grad_query: tuple[jax.Array, ...] = ()
        if settings.tiles.dq is not None:
            grad_query = KernelCall(dq, settings, ("query",))(arrays, settings.layouts.dq().arrays)
            results, kernel = ("key", "value"), dkv
        rest = KernelCall(kernel, settings, results, summed=("key", "value"))
        return *grad_query, *rest(arrays, settings.layouts.dkv().arrays)

    def elsewhere(*operands: Any) -> tuple[jax.Array, ...]:
        inputs, tokens, _, _, grads = operands
        assert fallback is not None
        return jax.vjp(lambda *qkv: fallback(*qkv, tokens), *inputs)[1](grads)

    operands = ((query, key, value), tokens, out, lse, grads)
    if fallback is None:
        gradients = kernels(*operands)
    else:
        gradients = lax.platform_dependent(*operands, cuda=kernels, default=elsewhere)
    return (*gradients, None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Portable, *args: Any) -> tuple[jax.Array, jax.Array]:
    out, lse = _forward(static, *args)
    return out, lse / LOG2_E


_attention.defvjp(_forward_rule, _backward_rule)


@functools.partial(jax.jit, static_argnums=0)
def block_sparse_attention(
    static: Portable, query: jax.Array, key: jax.Array, value: jax.Array, tokens: Tokens
) -> tuple[jax.Array, jax.Array]:
    """Attention over the tiles that the layouts name; differentiable through output and LSE.

    Args:
      static: settings, layouts and what runs where there is no CUDA.
      query: `[batch, q_len, heads, head_dim]`, bfloat16, float16 or float32.
      key: `[batch, kv_len, kv_heads, head_dim]`.
      value: `[batch, kv_len, kv_heads, value_dim]`.
      tokens: heads, positions, lengths and segments.

    Returns:
      Output `[batch, q_len, heads, value_dim]`; LSE, float32 `[batch, heads, q_len]`.
    """
    arrays, tree = jax.tree.flatten((query, key, value, tokens))
    return _attention(static, *jax.tree.unflatten(tree, vary_alike(arrays)))
