"""Generation: prompts are taken in as rows and pages become free, and decoded together."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from models.cache import Kind, ModelCache
from models.checks import check_integer, check_kind
from models.config import ModelConfig
from models.sampling import Sampling
from models.steps import NO_TOKEN, Rows, decode_steps, give_pages, take_in
from models.transformer import Transformer

OnTokens = Callable[[int, list[int]], object]
_SMALLEST_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Generation:
    """Tokens that follow a prompt. reason: why there are no more; a stop token is the last one."""

    tokens: list[int]
    reason: Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """How much is generated at a time."""

    max_length: int = 4096
    """Tokens of a prompt and what follows it."""
    rows: int = 8
    """Sequences that are decoded together; further prompts wait."""
    cache: Kind = "evicting"
    """Keep what a head can still see, where the pattern allows that; or everything."""
    pages: int | None = None
    """Pages of each evicting layer, for all rows; by default every row has all it can need."""
    chunk: int | None = None
    """Tokens of a prompt that are taken in at a time; by default all. A later chunk lays the cache
    out for all of max_length, a layer at a time."""
    steps: int = 16
    """Tokens that are decoded before any are looked at; as many turns run, even for fewer."""

    def __post_init__(self) -> None:
        for name in ("max_length", "rows", "pages", "chunk", "steps"):
            value = getattr(self, name)
            if value is None:
                continue
            check_integer(name, value)
            if value < 1:
                raise ValueError(f"{name}={value!r} must be positive")
        if self.cache not in ("evicting", "contiguous"):
            raise ValueError(f"cache={self.cache!r} must be evicting or contiguous")


@dataclasses.dataclass
class _Request:
    number: int
    prompt: np.ndarray
    num_pages: int
    pages: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)


class Generator:
    """Generates from one model with caches of one size; compiles once for all prompts.

    Attributes:
      pages: of every layer that evicts, for all rows together.
    """

    def __init__(
        self, config: ModelConfig, model: Transformer, settings: GeneratorConfig | None = None
    ) -> None:
        settings = GeneratorConfig() if settings is None else settings
        check_kind("config", config, ModelConfig)
        check_kind("model", model, Transformer)
        check_kind("settings", settings, GeneratorConfig)
        self.config = config
        self.settings = settings
        if (vocabulary := model.embed.shape[0]) != config.vocab_size:
            raise ValueError(
                f"vocab_size={config.vocab_size} is not that of the model, {vocabulary}"
            )
        self._graphdef, params = nnx.split(model, nnx.Param)
        # Layers would cast their matrices in every step, and read twice as much.
        dtype = jnp.dtype(config.dtype)
        self._params = jax.tree.map(lambda x: x.astype(dtype) if x.ndim > 1 else x, params)
        self._shapes = jax.eval_shape(lambda: self._make_cache(1))
        if self.settings.pages and not self._shapes.slots:
            raise ValueError(f"pages={self.settings.pages}, but no layer evicts anything")
        self.pages = self.settings.pages or self.settings.rows * self._shapes.slots

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[int] = (),
        seed: int = 0,
        on_tokens: OnTokens | None = None,
    ) -> list[Generation]:
        """What follows each prompt. A result depends on its prompt, its number and the seed alone.

        Args:
          prompts: tokens, at least one each.
          max_tokens: most tokens to generate for each.
          sampling: how tokens are drawn; by default at temperature 1.
          stop: tokens after which a sequence ends.
          seed: from 0 to below 2**32.
          on_tokens: called with the number of a prompt and its next tokens, as they come.

        Raises:
          ValueError, TypeError: an empty prompt, a token out of range, a sequence longer than
            `max_length`, or one that needs more pages than there are; all before anything is
            computed.
          FloatingPointError: the model gives NaN.
        """
        sampling = Sampling() if sampling is None else sampling
        check_kind("sampling", sampling, Sampling)
        stop = tuple(stop)  # read more than once
        check_integer("seed", seed)
        if not 0 <= seed < 1 << 32:
            raise ValueError(f"{seed=} must be from 0 to below 2**32")
        requests = self._checked(prompts, max_tokens, stop)
        batch = _Batch(self, requests, max_tokens, sampling, stop, seed, on_tokens)
        while batch.waiting or batch.running:
            batch.admit()
            if batch.running:
                batch.decode()
        return [batch.results[request.number] for request in requests]

    def pages_needed(self, length: int) -> int:
        """Pages that a sequence of `length` tokens takes of each layer that evicts."""
        return self._shapes.pages_needed(length)

    def empty_cache(self) -> ModelCache:
        return self._make_cache(self.pages or 1)

    def _make_cache(self, num_pages: int) -> ModelCache:
        settings = self.settings
        return ModelCache.create(
            self.config,
            batch=settings.rows,
            max_length=settings.max_length,
            kind=settings.cache,
            num_pages=num_pages,
        )

    def _checked(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, stop: Sequence[int]
    ) -> list[_Request]:
        vocab, longest = self.config.vocab_size, self.settings.max_length
        check_integer("max_tokens", max_tokens)
        if max_tokens < 1:
            raise ValueError(f"{max_tokens=} must be positive")
        for token in stop:
            check_integer("stop", token)
        if not all(0 <= token < vocab for token in stop):
            raise ValueError(f"stop={list(stop)} must be tokens from 0 to below {vocab}")
        requests = []
        for number, prompt in enumerate(prompts):
            tokens = np.asarray(prompt)
            if tokens.ndim != 1 or not tokens.size:
                raise ValueError(f"prompt {number} must be a row of at least one token")
            if not np.issubdtype(tokens.dtype, np.integer):
                raise TypeError(f"prompt {number} must hold integers, got {tokens.dtype}")
            if tokens.min() < 0 or tokens.max() >= vocab:
                raise ValueError(
                    f"prompt {number} has tokens from {tokens.min()} to {tokens.max()}, "
                    f"they must be from 0 to below {vocab}"
                )
            length = tokens.size + max_tokens
            if length > longest:
                raise ValueError(
                    f"prompt {number} has {tokens.size} tokens and {max_tokens=}: more than "
                    f"max_length={longest} in all"
                )
            if (need := self.pages_needed(length)) > self.pages:
                raise ValueError(
                    f"prompt {number} needs {need} pages, but there are pages={self.pages}"
                )
            requests.append(_Request(number, tokens.astype(np.int32), need))
        return requests

    def take_in(
        self, cache: ModelCache, row: int, request: _Request, sampling: Sampling, key: Array
    ) -> tuple[int, ModelCache]:
        """A prompt joins a row, chunk by chunk; the token that follows it, and the cache."""
        pages = np.full(max(cache.slots, request.num_pages), -1, np.int32)
        pages[: request.num_pages] = request.pages
        cache = give_pages(cache, row, jnp.asarray(pages))
        length = request.prompt.size
        chunk = min(self.settings.chunk or length, length)
        token: Any = None
        for start in range(0, length, chunk):
            part = request.prompt[start : start + chunk]
            padded = np.zeros((1, min(_bucket(part.size), self.settings.max_length)), np.int32)
            padded[0, : part.size] = part
            token, cache = take_in(
                self._params,
                cache,
                jnp.asarray(padded),
                np.int32(part.size),
                np.int32(row),
                key,
                np.int32(request.number),
                graphdef=self._graphdef,
                sampling=sampling,
                first=start == 0,
            )
        return int(token), cache

    def decode(
        self, cache: ModelCache, rows: Rows, sampling: Sampling, stops: Array, key: Array
    ) -> tuple[np.ndarray, Rows, ModelCache]:
        """Some tokens of every row in use, `[steps, rows]`, -1 where there is none."""
        produced, rows, cache = decode_steps(
            self._params,
            cache,
            rows,
            key,
            stops,
            graphdef=self._graphdef,
            sampling=sampling,
            steps=self.settings.steps,
        )
        return np.asarray(produced), rows, cache


class _Batch:
    """One call of `Generator.generate`: who waits, who has a row, and which pages are free."""

    def __init__(
        self,
        generator: Generator,
        requests: list[_Request],
        max_tokens: int,
        sampling: Sampling,
        stop: Sequence[int],
        seed: int,
        on_tokens: OnTokens | None,
    ) -> None:
        self.waiting = collections.deque(requests)
        self.running: dict[int, _Request] = {}
        self.results: dict[int, Generation] = {}
        self._generator = generator
        self._max_tokens, self._sampling, self._stop = max_tokens, sampling, frozenset(stop)
        self._stops, self._key = jnp.asarray(sorted(self._stop), jnp.int32), jax.random.key(seed)
        self._tell = on_tokens or (lambda number, tokens: None)
        self._free_pages = list(range(generator.pages))
        self._free_rows = list(range(generator.settings.rows))
        none = np.zeros((generator.settings.rows,), np.int32)
        self._rows = Rows(*(jnp.asarray(none) for _ in Rows._fields))
        self._cache = generator.empty_cache()

    def admit(self) -> None:
        """Takes in prompts, in their order, while there are rows and pages for them."""
        while self.waiting and self._free_rows:
            request = self.waiting[0]
            if request.num_pages > len(self._free_pages):
                return
            self.waiting.popleft()
            row = self._free_rows.pop(0)
            request.pages = self._free_pages[: request.num_pages]
            del self._free_pages[: request.num_pages]
            token, self._cache = self._generator.take_in(
                self._cache, row, request, self._sampling, self._key
            )
            self.running[row] = request
            left = 0 if token in self._stop or token == NO_TOKEN else self._max_tokens - 1
            self._rows = Rows(
                self._rows.token.at[row].set(token),
                self._rows.left.at[row].set(left),
                self._rows.request.at[row].set(request.number),
            )
            self._add(row, [token], left)

    def decode(self) -> None:
        produced, self._rows, self._cache = self._generator.decode(
            self._cache, self._rows, self._sampling, self._stops, self._key
        )
        left = np.asarray(self._rows.left)
        for row in list(self.running):
            new = produced[:, row]
            self._add(row, new[new != -1].tolist(), left[row])

    def _add(self, row: int, tokens: list[int], left: int) -> None:
        request = self.running[row]
        if NO_TOKEN in tokens:
            raise FloatingPointError(
                f"the model's logits are NaN after {len(request.tokens)} tokens of prompt "
                f"{request.number}"
            )
        request.tokens += tokens
        self._tell(request.number, tokens)
        if not left:
            stopped = request.tokens[-1] in self._stop
            self.results[request.number] = Generation(
                request.tokens, "stop" if stopped else "length"
            )
            del self.running[row]
            self._free_pages += request.pages
            self._free_rows.append(row)


def _bucket(length: int) -> int:
    """Prompts of about one length share a compiled program: the next power of two."""
    return max(_SMALLEST_CHUNK, 1 << (length - 1).bit_length())
