"""Text to tokens and back: bytes, or a tokenizer of the `tokenizers` package."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import tokenizers
from jaxtyping import Int

END_TOKEN = "<|endoftext|>"
NUM_BYTES = 256
# What a token may span: a word and one character before it, three digits, punctuation and the ends
# of lines after it, or white space. C has 23% fewer tokens than with GPT-2's expression.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokenizer(Protocol):
    """What the rest of the code asks of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Every token is smaller."""

    @property
    def end_token(self) -> int:
        """The token that ends a document; no text contains it."""

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " tokens"]]:
        """Every text by itself, without special tokens."""

    def decode(self, tokens: Int[np.ndarray, " tokens"]) -> str:
        """The text; bytes that are not UTF-8 become the replacement character."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """A token is a byte of UTF-8; the zero byte ends a document."""

    vocab_size: int = NUM_BYTES
    end_token: int = 0

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " tokens"]]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, tokens: Int[np.ndarray, " tokens"]) -> str:
        return bytes(np.asarray(tokens).tolist()).decode("utf-8", errors="replace")


class TextTokenizer:
    """A tokenizer of the `tokenizers` package, made from the text of its `tokenizer.json`."""

    def __init__(self, json: str, end_token: str = END_TOKEN) -> None:
        """Raises ValueError where the text is no tokenizer, or has no such end token."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the package raises nothing more specific
            raise ValueError(f"tokenizer: not a tokenizer.json ({error})") from None
        self.json, self.end_text = json, end_token
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # A text that spells the end token out does not end there.
        self._tokenizer.encode_special_tokens = True
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        if end_token not in special:
            raise ValueError(
                f"{end_token=} must be a special token of the tokenizer, which has "
                f"{', '.join(sorted(special)) or 'none'}"
            )
        self.end_token = special[end_token]
        self.vocab_size = max(self._tokenizer.get_vocab().values()) + 1

    def encode(self, texts: Sequence[str]) -> list[Int[np.ndarray, " tokens"]]:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in encodings]

    def decode(self, tokens: Int[np.ndarray, " tokens"]) -> str:
        return self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> str:
    """A byte-level BPE as the text of its `tokenizer.json`; any text can be encoded.

    The vocabulary is smaller than asked for if the texts hold too few different pairs.

    Raises:
        ValueError: the vocabulary has no room for the 256 bytes and the end token.
    """
    if vocab_size <= NUM_BYTES:
        raise ValueError(f"{vocab_size=} must be at least 257: all bytes, and the end token")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORDS), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=[END_TOKEN],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()
