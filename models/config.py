"""What a model is: frozen numbers that check themselves, and one pattern per layer."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import s2_jax
from s2_jax import Pattern

Remat = Literal["none", "full", "attention"]


def _check_choice(config: Any, name: str, *choices: str) -> None:
    value = getattr(config, name)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """Which layers are dense, and what the heads of the others see."""

    kind: Literal["s2", "dense", "window"] = "s2"
    """The layers that are not dense: S2, or an exact sliding window; or all layers dense."""
    dense_first: int = 1
    """That many layers at the bottom are dense."""
    dense_every: int = 0
    """The n-th layer, the 2n-th, ... are dense too (counted from 1); 0 for none."""
    block_size: int = 64
    """Tokens per block, the unit in which a pattern selects: 16, 32, 64 or 128."""
    local_blocks: int = 4
    """S2: the last key blocks that every head sees, the query's own block included."""
    vert_stride: int = 8
    """S2: of the earlier key blocks, every head sees one in so many, each head its own."""
    heads: Literal["kv", "query"] = "kv"
    """S2: whether key/value heads have a pattern each, or query heads."""
    homogeneous: bool = False
    """S2: all heads see the same columns; excludes a head step."""
    head_offset: int = 0
    """S2: shifts the columns of all heads, in blocks."""
    head_step: int | None = None
    """S2: shift of the columns from head to head, in blocks; vert_stride over heads if left out."""
    window: int | None = None
    """The last tokens that a head sees, exactly: all of a window layer; S2 sees them as well."""

    def __post_init__(self) -> None:
        _check_choice(self, "kind", "s2", "dense", "window")
        for name in ("dense_first", "dense_every"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name}={value!r} must be 0 or more")
        if self.kind == "window" and self.window is None:
            raise ValueError('kind="window" needs window, the number of tokens that a head sees')
        if self.kind == "dense" and self.window is not None:
            raise ValueError(f'kind="dense" sees everything: it takes no window={self.window!r}')
        _ = self.sparse, self.dense  # the library checks the rest

    @property
    def sparse(self) -> Pattern:
        """What the layers see that are not dense."""
        if self.kind == "dense":
            return self.dense
        if self.kind == "window":
            return self._token_window
        stride = s2_jax.local_stride(
            self.local_blocks,
            self.vert_stride,
            block_size=self.block_size,
            heads=self.heads,
            homogeneous=self.homogeneous,
            head_offset=self.head_offset,
            head_step=self.head_step,
        )
        return stride if self.window is None else stride | self._token_window

    @property
    def dense(self) -> Pattern:
        return s2_jax.dense(block_size=self.block_size)

    @property
    def _token_window(self) -> Pattern:
        assert self.window is not None
        return s2_jax.token_window(self.window, block_size=self.block_size)

    def is_dense(self, layer: int) -> bool:
        every = self.dense_every
        at_depth = layer < self.dense_first or (every > 0 and (layer + 1) % every == 0)
        return self.kind == "dense" or at_depth


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder-only transformer."""

    vocab_size: int = 256
    """Number of tokens; the 256 bytes by default."""
    num_layers: int = 4
    """Attention and MLP pairs."""
    width: int = 128
    """Features of the residual stream."""
    num_heads: int = 4
    """Query heads."""
    num_kv_heads: int = 4
    """Key/value heads; fewer than num_heads for grouped-query attention."""
    head_dim: int | None = None
    """Features of a head; width / num_heads if left out."""
    mlp_width: int = 384
    """Hidden features of the gated MLP."""
    norm_epsilon: float = 1e-6
    """Added to the mean square that a norm divides by."""
    tie_embeddings: bool = False
    """Read the logits off with the embedding itself; there is no head."""
    rope_base: float = 10_000.0
    """Base of the rotary position embedding; raise it for long contexts."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the matrices are stored in, and so their optimiser state; norms stay float32."""
    implementation: Literal["triton", "jax_triton", "interpret", "reference"] | None = None
    """How attention runs; None takes the GPU kernels on a GPU and the reference elsewhere."""
    dense_implementation: Literal["cudnn"] | None = None
    """How dense layers run, if not like the others: by cuDNN, without segments (GPU only)."""
    remat: Remat = "none"
    """What the backward pass recomputes to save memory: nothing; every layer, a third more work;
    or every layer but the attention itself, whose output it keeps (and where tokens are exchanged
    over mesh axis tensor, the residual stream after it)."""
    scan_layers: bool = False
    """Compile layers that repeat once, which takes a fraction of the time, and a second copy of
    the parameters; generating does not."""
    attention: HybridConfig = HybridConfig()
    """Dense layers and S2 layers."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "width", "num_heads", "num_kv_heads", "mlp_width"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value!r} must be positive")
        width, num_heads, num_kv_heads = self.width, self.num_heads, self.num_kv_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads=} must be a multiple of {num_kv_heads=}")
        if self.head_dim is None:
            if width % num_heads or (width // num_heads) % 2:
                raise ValueError(
                    f"{width=} must be an even multiple of {num_heads=} (RoPE turns pairs), "
                    "or give head_dim"
                )
        elif self.head_dim < 1 or self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim!r} must be positive and even: RoPE turns pairs"
            )
        if not 0 < self.norm_epsilon < 1:
            raise ValueError(f"norm_epsilon={self.norm_epsilon!r} must be between 0 and 1")
        if not 1 < self.rope_base < math.inf:
            raise ValueError(f"rope_base={self.rope_base!r} must be greater than 1, and finite")
        if not isinstance(self.attention, HybridConfig):
            raise TypeError(
                f"attention={self.attention!r} must be a HybridConfig, as HybridConfig('dense')"
            )
        _check_choice(self, "dtype", "float32", "bfloat16")
        _check_choice(self, "param_dtype", "float32", "bfloat16")
        if self.param_dtype == "bfloat16" and self.dtype == "float32":
            raise ValueError("param_dtype='bfloat16' needs dtype='bfloat16'")
        if self.dense_implementation is not None:
            _check_choice(self, "dense_implementation", "cudnn")
            if self.dtype == "float32":
                raise ValueError("dense_implementation='cudnn' needs dtype='bfloat16'")
        _check_choice(self, "remat", "none", "full", "attention")
        first = 0 if self.attention.kind == "dense" else self.attention.dense_first
        if first > self.num_layers:
            raise ValueError(f"dense_first={first} is more than num_layers={self.num_layers}")

    @property
    def head_features(self) -> int:
        """`head_dim`, or what stands for it where it is left out."""
        return self.width // self.num_heads if self.head_dim is None else self.head_dim

    def implementation_of(self, pattern: Pattern) -> str | None:
        """How a layer with this pattern attends."""
        of_dense = self.dense_implementation
        return of_dense if of_dense and pattern == self.attention.dense else self.implementation

    def patterns(self) -> tuple[Pattern, ...]:
        """One pattern per layer, from the bottom up."""
        hybrid = self.attention
        return tuple(
            hybrid.dense if hybrid.is_dense(layer) else hybrid.sparse
            for layer in range(self.num_layers)
        )

    def densities(self, length: int) -> tuple[float, ...]:
        """Per layer, the share of the causally possible blocks that is computed at this length."""
        return tuple(
            pattern.density(self.num_heads, length, length, self.num_kv_heads)
            for pattern in self.patterns()
        )
