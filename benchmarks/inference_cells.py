"""What is measured of one model, what of it fits, and attention of one layer alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from benchmarks.attention_worker import first_line
from benchmarks.filled_caches import filled_model
from benchmarks.jax_timing import calls, in_turn
from benchmarks.programs import Lower, Program, compile_all, peak_memory, time_all
from benchmarks.random_arrays import draw
from benchmarks.sdpa import SdpaCase, measure_sdpa
from benchmarks.serving import Served, bytes_of, rows_of
from benchmarks.timing import summary
from models.cache import ModelCache
from models.config import ModelConfig
from s2_jax import s2_attention

Row = dict[str, Any]
_RESERVED = 0.05
"""Of the memory, for intermediate results of a decode step."""
_LENGTHS_TRIED = 32
_OTHER_CALLS = 3  # than those of rounds


class Asked(NamedTuple):
    """Prompts of these lengths; generation up to a length, in these batches and the largest one."""

    prompts: Sequence[int]
    decode_length: int
    batches: Sequence[int]
    largest: bool


class Rounds(Protocol):
    """How to measure."""

    @property
    def steps(self) -> int: ...
    @property
    def rounds(self) -> int: ...
    @property
    def cell_s(self) -> float: ...


@dataclasses.dataclass(frozen=True)
class Cell:
    """cached: the prompt's keys and values are kept. why_not: why it is not run."""

    part: Literal["prefill", "decode"]
    batch: int
    length: int
    cached: bool = True
    why_not: str | None = None

    def lower(self, served: Served, steps: int) -> Lower:
        if self.part == "decode":
            return served.decode(self.batch, self.length, steps)
        return served.prefill(self.length) if self.cached else served.prefill_alone(self.length)

    def measure(
        self, served: Served, params: Any, program: Program | str | None, how: Rounds
    ) -> Row:
        """ms: of a whole prompt, or of one step of a batch. peak_bytes: where this cell reached it.

        read_bytes: of a step.
        """
        config, steps = served.config, how.steps if self.part == "decode" else 1
        dense = sum(pattern == config.attention.dense for pattern in config.patterns())
        row: Row = dataclasses.asdict(self) | {"way": "model", "dense_layers": dense}
        del row["why_not"]
        row |= {"parameter_bytes": served.weight_bytes, "tokens_s": None, "peak_bytes": None}
        if not isinstance(program, Program):
            return row | summary([]) | {"error": program}
        before = peak_memory()
        try:
            call, facts = self._call(served, params, program, how)
            times = in_turn({0: calls(call)}, how.rounds, limit_s=how.cell_s, profile=True)[0]
        except Exception as failure:  # out of memory, say
            times, facts = summary([]) | {"error": first_line(failure)}, {}
        for name in ("ms", "min_ms", "max_ms", "busy_ms"):
            times[name] = times[name] and times[name] / steps
        times["kernels_ms"] = {name: ms / steps for name, ms in times["kernels_ms"].items()}
        row |= times | facts | program.facts
        if before != (after := peak_memory()):
            row["peak_bytes"] = after
        tokens = self.batch * (1 if self.part == "decode" else self.length)
        row["tokens_s"] = row["ms"] and 1e3 * tokens / row["ms"]
        return row

    def _call(
        self, served: Served, params: Any, program: Program, how: Rounds
    ) -> tuple[Callable[[], Any], Row]:
        """Queues one call, which goes on with the cache that the last one left; and facts."""
        if self.part == "prefill":
            tokens = jax.random.randint(
                jax.random.key(0), (1, self.length), 0, served.config.vocab_size, jnp.int32
            )
            if not self.cached:
                return lambda: program.run(params, tokens), {}
            make = functools.partial(ModelCache.create, served.config, batch=1)
            state = [jax.jit(functools.partial(make, max_length=self.length))()]

            def prefill() -> Any:
                token, state[0] = program.run(params, tokens, state[0])
                return token

            return prefill, {}
        # Room for the tokens of all calls.
        start = max(1, self.length - how.steps * (how.rounds + _OTHER_CALLS))
        cache = filled_model(served.config, self.batch, self.length, start)
        facts = {"read_bytes": served.read_bytes(cache), "cache_bytes": bytes_of(cache)}
        key, stops = jax.random.key(0), jnp.zeros((0,), jnp.int32)
        held = [rows_of(self.batch), cache]
        del cache

        def decode() -> Any:
            rows, held[0] = held[0], None
            cache, held[1] = held[1], None
            produced, held[0], held[1] = program.run(params, cache, rows, key, stops)
            return produced

        return decode, facts


def plan(served: Served, asked: Asked, limit: int | None) -> list[Cell]:
    """The cells of a model; limit: bytes that there are, None for any number.

    Where a prompt does not fit with its cache, it is timed without one; where no sequence of
    `decode_length` fits, a shorter one is decoded.
    """
    room = None if limit is None else int(limit * (1 - _RESERVED)) - served.weight_bytes
    cells = []
    for length in asked.prompts:
        needed = served.cache_bytes(length) + served.prefill_bytes(length)
        cells.append(Cell("prefill", 1, length, cached=room is None or needed <= room))
    length = asked.decode_length
    if limit is None or room is None:
        return [*cells, *(Cell("decode", batch, length) for batch in asked.batches)]
    each = served.cache_bytes(length)
    fits = max(0, room // each)
    for batch in dict.fromkeys([*asked.batches, *[fits] * (asked.largest and fits > 0)]):
        size = (served.weight_bytes + batch * each) / 1e9
        why = None if batch <= fits else f"does not fit: {size:.1f} GB of {limit / 1e9:.1f}"
        cells.append(Cell("decode", batch, length, why_not=why))
    if fits == 0:
        tried = (length * n // _LENGTHS_TRIED for n in range(_LENGTHS_TRIED - 1, 0, -1))
        shorter = next((n for n in tried if n and served.cache_bytes(n) <= room), None)
        cells += [Cell("decode", 1, shorter)] if shorter else []
    return cells


def attention_rows(config: ModelConfig, length: int, rounds: int) -> list[Row]:
    """Attention of one layer over a prompt, as the model calls it; dense also without lengths."""
    dense, sparse = config.attention.dense, config.attention.sparse
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    inputs = tuple(
        draw(jax.random.key(i), (1, length, n, config.head_features)) for i, n in enumerate(heads)
    )
    lengths = jnp.full((1,), length, jnp.int32)

    def lower(pattern: Any, masked: bool) -> Lower:
        def attend(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array) -> Any:
            names = ("query_seq_lengths", "key_value_seq_lengths")
            options: Any = dict.fromkeys(names, lengths) if masked else {}
            options["implementation"] = config.implementation_of(pattern)
            return s2_attention(query, key, value, pattern, **options)

        return lambda: jax.jit(attend).lower(*inputs, lengths)

    jobs = {
        "dense": lower(dense, True),
        "dense, no lengths": lower(dense, False),
        "s2": lower(sparse, True),
        "s2, no lengths": lower(sparse, False),
    }
    found = time_all(
        compile_all(jobs),
        lambda way, program: calls(lambda: program.run(*inputs, lengths)),
        rounds=rounds,
    )
    facts = {"part": "attention", "batch": 1, "length": length}
    return [facts | {"way": way} | times for way, times in found.items()]


def fa2_rows(
    config: ModelConfig, lengths: Sequence[int], rounds: int, logs: Path
) -> tuple[str, list[Row]]:
    """The same by PyTorch's FlashAttention-2: whether it is there, and a row for each length."""
    cases = [
        SdpaCase(
            "FLASH_ATTENTION", 1, config.num_heads, config.num_kv_heads, config.head_features,
            length, length,
        )
        for length in lengths
    ]  # fmt: skip
    status, found = measure_sdpa(cases, ["FLASH_ATTENTION"], rounds, logs)
    facts = {"part": "attention", "batch": 1, "way": "torch FA2"}
    return status, [facts | {"length": case.kv_len} | times for case, times in found.items()]
