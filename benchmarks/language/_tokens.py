"""Text as tokens: bytes, words, or the tokens of a `tokenizer.json`."""

import collections
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ._errors import UsageError

END_OF_LINE = "<eos>"
UNKNOWN = "<unk>"
_CHUNK = 1 << 16  # characters that are handed to a tokenizer at a time


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A text as tokens, with what each token stands for.

    Attributes:
        ids: the tokens.
        sizes: how many bytes of the text belong to each token.
        words: how many words of the text begin in each token.
    """

    ids: np.ndarray
    sizes: np.ndarray
    words: np.ndarray


class ByteTokenizer:
    """Every byte is a token.

    Args:
        lines_are_words: whether the end of a line counts as a word, as it does in the
            perplexities that are published for WikiText.
    """

    vocab_size = 256

    def __init__(self, *, lines_are_words: bool = False):
        self._lines_are_words = lines_are_words

    def encode(self, text: bytes) -> Tokens:
        """The tokens of a text."""
        ids = np.frombuffer(text, np.uint8)
        words = word_starts(text, self._lines_are_words)
        return Tokens(ids, np.ones(len(ids), np.int32), words)

    def files(self) -> dict[str, str]:
        """What has to be kept to read a model's output: nothing."""
        return {}


class WordTokenizer:
    """The words between white space, and a token for the end of each line.

    The vocabulary holds the words of the training text, by falling frequency and then
    by spelling, as an adaptive softmax expects them.

    Args:
        text: for training.
        least: how often a word has to occur; rarer ones become `<unk>`.

    Raises:
        UsageError: if the text has no words or is not UTF-8.
    """

    def __init__(self, text: bytes, *, least: int):
        counts = collections.Counter(_words(_decode(text)))
        kept = (END_OF_LINE, UNKNOWN)
        rare = [w for w, count in counts.items() if count < least and w not in kept]
        for word in rare:
            counts[UNKNOWN] += counts.pop(word)
        if set(counts) <= {END_OF_LINE, UNKNOWN}:
            raise UsageError(
                f"--tokens: no word occurs {least} times in the training text; give "
                "more text, or --tokens bytes"
            )
        self.vocabulary = sorted(counts, key=lambda word: (-counts[word], word))
        self._index = {word: i for i, word in enumerate(self.vocabulary)}

    @property
    def vocab_size(self) -> int:
        """Words in the vocabulary."""
        return len(self.vocabulary)

    def encode(self, text: bytes) -> Tokens:
        """The tokens of a text; a word and the space after it count as its bytes.

        Raises:
            UsageError: if a word is unknown and the vocabulary has no `<unk>`.
        """
        words = _words(_decode(text))
        unknown = self._index.get(UNKNOWN)
        ids = [self._index.get(word, unknown) for word in words]
        if unknown is None and None in ids:
            raise UsageError(
                f"--data: `{words[ids.index(None)]}` occurs in the validation text "
                f"but not in the training text, which has no {UNKNOWN} either; use "
                "text whose parts belong together"
            )
        sizes = [len(word.encode()) + 1 if word != END_OF_LINE else 1 for word in words]
        return Tokens(
            np.array(ids, np.int32),
            np.array(sizes, np.int32),
            np.ones(len(words), np.int32),
        )

    def files(self) -> dict[str, str]:
        """The vocabulary."""
        return {"vocabulary.json": json.dumps(self.vocabulary, ensure_ascii=False)}


class FileTokenizer:
    """The tokens of a `tokenizer.json`, as the `tokenizers` library reads it.

    Args:
        path: of the file.
        lines_are_words: as of `ByteTokenizer`.

    Raises:
        UsageError: if the file or the library cannot be used.
    """

    def __init__(self, path: Path, *, lines_are_words: bool = False):
        try:
            import tokenizers
        except ImportError as error:
            raise UsageError(
                f"--tokens: {path} needs the library tokenizers; install it with "
                "`pip install tokenizers`, or use --tokens bytes"
            ) from error
        try:
            self._content = path.read_text(encoding="utf-8")
            self._tokenizer = tokenizers.Tokenizer.from_str(self._content)
        except Exception as error:  # tokenizers raises bare exceptions
            raise UsageError(
                f"--tokens: {path} is no tokenizer.json ({error}); give such a file, "
                "`bytes` or `words`"
            ) from error
        self._lines_are_words = lines_are_words

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary, added ones included."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: bytes) -> Tokens:
        """The tokens of a text, which is handed to the tokenizer by groups of lines.

        Raises:
            UsageError: if the text is not UTF-8.
        """
        ids, ends, before = [], [], 0
        for chunk in _chunks(_decode(text)):
            found: Any = self._tokenizer.encode(chunk, add_special_tokens=False)
            # Offsets are in characters; those of a character's parts coincide.
            sizes = [len(c.encode()) for c in chunk]
            places = np.cumsum([0, *sizes])
            last = np.array([end for _, end in found.offsets], np.int64)
            ids.append(np.array(found.ids, np.int32))
            ends.append(before + places[np.maximum.accumulate(last)])
            if len(last):
                ends[-1][-1] = before + places[-1]  # white space that was dropped
            before += int(places[-1])
        if not any(map(len, ids)):
            raise UsageError("--tokens: the tokenizer finds no token in the text")
        stops = np.concatenate(ends)
        starts = np.cumsum([0, *word_starts(text, self._lines_are_words)])
        words = np.diff(starts[stops], prepend=0)
        sizes = np.diff(stops, prepend=0)
        return Tokens(np.concatenate(ids), sizes, words)

    def files(self) -> dict[str, str]:
        """The file itself."""
        return {"tokenizer.json": self._content}


Tokenizer = ByteTokenizer | WordTokenizer | FileTokenizer


def make_tokenizer(
    kind: str, text: bytes, *, least: int = 1, lines_are_words: bool = False
) -> Tokenizer:
    """The tokenizer that `--tokens` names.

    Args:
        kind: `"bytes"`, `"words"` or the path of a `tokenizer.json`.
        text: for training, from which a vocabulary of words is built.
        least: as of `WordTokenizer`.
        lines_are_words: as of `ByteTokenizer`.
    """
    if kind == "bytes":
        return ByteTokenizer(lines_are_words=lines_are_words)
    if kind == "words":
        return WordTokenizer(text, least=least)
    if not Path(kind).is_file():
        raise UsageError(
            f"--tokens: got {kind!r}, but it must be bytes, words or the path of a "
            "tokenizer.json"
        )
    return FileTokenizer(Path(kind), lines_are_words=lines_are_words)


def word_starts(text: bytes, lines_are_words: bool) -> np.ndarray:
    """For each byte whether a word begins with it, and a line's end if that counts."""
    is_space = np.isin(np.frombuffer(text, np.uint8), np.frombuffer(b" \t\r\n", "u1"))
    before = np.concatenate([[True], is_space])[: len(is_space)]
    starts = ~is_space & before
    if lines_are_words:
        starts |= np.frombuffer(text, np.uint8) == ord("\n")
    return starts.astype(np.int32)


def _words(text: str) -> list[str]:
    return [w for line in text.splitlines() for w in (*line.split(), END_OF_LINE)]


def _decode(text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--data: the text is not UTF-8 ({error}); convert it, or use --tokens "
            "bytes"
        ) from error


def _chunks(text: str) -> Iterator[str]:
    """Whole lines, several at a time."""
    part: list[str] = []
    size = 0
    for line in _lines(text):
        part.append(line)
        size += len(line)
        if size >= _CHUNK:
            yield "".join(part)
            part, size = [], 0
    if part:
        yield "".join(part)


def _lines(text: str) -> Sequence[str]:
    return text.splitlines(keepends=True)
