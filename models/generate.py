"""`python -m models.generate`: what a trained or imported model writes after a prompt."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from models.generator import Generator, GeneratorConfig
from models.sampling import Sampling
from models.saved import Text, load_model

_SAMPLING, _GENERATOR = Sampling(temperature=0.8), GeneratorConfig(steps=8)


@dataclasses.dataclass(frozen=True)
class Options:
    """Write on after one or several prompts."""

    checkpoint: Path
    """Folder of a run of `python -m train`, or of a Hugging Face checkpoint."""
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A text to go on from; may be given several times. Read from standard input if left out."""
    max_tokens: int = 256
    """Most tokens to write after each."""
    sampling: Sampling = _SAMPLING
    """How tokens are drawn."""
    generator: GeneratorConfig = _GENERATOR
    """How much is done at a time."""
    stop: bool = True
    """End where the model ends a text."""
    seed: int = 0
    """Of the random numbers."""


class _Stream:
    """Prints a text as its tokens come, and never half of a character."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._tokens: list[int] = []
        self._shown = 0

    def add(self, tokens: list[int], *, last: bool = False) -> None:
        self._tokens += tokens
        written = self._text.decode(self._tokens)
        while not last and written.endswith("\ufffd"):
            written = written[:-1]
        print(written[self._shown :], end="", flush=True)
        self._shown = max(self._shown, len(written))


def run(options: Options) -> None:
    """Raises ValueError where the checkpoint or the options do not allow it."""
    saved = load_model(options.checkpoint)
    texts = options.prompt or (sys.stdin.read(),)
    prompts = [saved.text.encode(text) for text in texts]
    generator = Generator(saved.config, saved.model, options.generator)
    stream = _Stream(saved.text)
    alone, started = len(texts) == 1, time.perf_counter()
    first: list[float] = []

    def show(number: int, tokens: list[int]) -> None:
        first.append(time.perf_counter())
        if alone:
            stream.add(tokens)

    if alone:
        print(texts[0], end="", flush=True)
    results = generator.generate(
        prompts,
        max_tokens=options.max_tokens,
        sampling=options.sampling,
        stop=saved.text.stop if options.stop else (),
        seed=options.seed,
        on_tokens=show,
    )
    seconds = time.perf_counter() - started
    if alone:
        stream.add([], last=True)
        print()
    else:
        for text, result in zip(texts, results, strict=True):
            print(f"{text}{saved.text.decode(result.tokens)}\n{'-' * 40}")
    written = sum(len(result.tokens) for result in results)
    print(
        f"{written} tokens in {seconds:.2f} s, the first after {first[0] - started:.2f} s "
        f"(compiling included): {written / seconds:.1f} tokens/s",
        file=sys.stderr,
    )


def main() -> None:
    options = tyro.cli(Options, prog="python -m models.generate", description=Options.__doc__)
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
