"""`python -m models.generate`: what a trained or imported model writes after a prompt."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

from models.decoding import for_decoding
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
    """A text to go on from, printed with what follows as that comes; several are printed at the
    end. Read from standard input if left out."""
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

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed={self.seed!r} must be from 0 to below 2**32")


class _Stream:
    """Prints a prompt and the text after it as its tokens come, and never half of a character."""

    def __init__(self, text: Text, prompt: str) -> None:
        self._text = text
        self._prompt = prompt
        self._tokens: list[int] = []
        self._before = text.encode(prompt)
        self._shown: int | None = None

    def add(self, tokens: list[int], *, last: bool = False) -> None:
        if self._shown is None:
            print(self._prompt, end="")
            self._shown = 0
        self._tokens += tokens
        written = self._text.decode_after(self._before, self._tokens)
        while not last and written.endswith("\ufffd"):
            written = written[:-1]
        print(written[self._shown :], end="", flush=True)
        self._shown = max(self._shown, len(written))


def run(options: Options) -> None:
    """Raises ValueError where the checkpoint or the options do not allow it."""
    saved = load_model(options.checkpoint)
    texts = options.prompt or (_standard_input(),)
    if not all(texts):
        raise ValueError("the prompt is empty: give the model something to go on from")
    for number, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # how Python hands on bytes that are not UTF-8
            raise ValueError(f"prompt {number} is not UTF-8") from None
    prompts = [saved.text.encode(text) for text in texts]
    saved = dataclasses.replace(saved, model=for_decoding(saved.model))  # the other one is freed
    # A row costs memory and time, used or not.
    rows = min(options.generator.rows, len(texts))
    settings = dataclasses.replace(options.generator, rows=rows)
    generator = Generator(saved.config, saved.model, settings)
    stream = _Stream(saved.text, texts[0])
    alone, started = len(texts) == 1, time.perf_counter()
    first: list[float] = []

    def show(number: int, tokens: list[int]) -> None:
        first.append(time.perf_counter())
        if alone:
            stream.add(tokens)

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
        for text, prompt, result in zip(texts, prompts, results, strict=True):
            print(f"{text}{saved.text.decode_after(prompt, result.tokens)}\n{'-' * 40}")
    written = sum(len(result.tokens) for result in results)
    print(
        f"{written} tokens in {seconds:.2f} s, the first after {first[0] - started:.2f} s "
        f"(compiling included): {written / seconds:.1f} tokens/s",
        file=sys.stderr,
    )


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8: {error}") from None


def main() -> None:
    try:
        run(tyro.cli(Options, prog="python -m models.generate", description=Options.__doc__))
    except KeyboardInterrupt:
        print()
        sys.exit(130)
    except BrokenPipeError:  # whoever read the text has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
