"""Text: the standard library's sources, any files, or WikiText-103."""

import dataclasses
import sysconfig
import zlib
from pathlib import Path

import numpy as np

from ._errors import UsageError
from ._tokens import Tokens, make_tokenizer

# Directories of the standard library whose files are no ordinary source text.
_LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
}
_VALID_SHARE = 20  # one file in so many is held out, or the end of a single file


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokens for training and for validation.

    Attributes:
        name: of the data.
        train: tokens.
        valid: tokens of other files than those of `train`.
        vocab_size: tokens in the vocabulary.
        files: what has to be kept to read a model's output, by the name of the file.
    """

    name: str
    train: np.ndarray
    valid: Tokens
    vocab_size: int
    files: dict[str, str]


def load_corpus(
    data: str,
    data_dir: Path | None,
    length: int,
    *,
    tokens: str | None = None,
    least: int = 1,
) -> Corpus:
    """The corpus that `--data` names.

    Args:
        data: `"stdlib"`, `"wikitext-103"`, or the path of a file or directory.
        data_dir: where WikiText-103 lies.
        length: of a sequence, of which each part has to hold one.
        tokens: see `make_tokenizer`; None: words of WikiText, bytes of other text.
        least: how often a word has to occur to be a token.

    Raises:
        UsageError: if it is missing, empty or unreadable.
    """
    is_wikitext = data == "wikitext-103"
    if is_wikitext:
        if data_dir is None:
            raise UsageError(
                "--data-dir: missing; --data wikitext-103 is read from disk, so give "
                "the directory that holds wiki.train.tokens and wiki.valid.tokens"
            )
        name, train, valid = "WikiText-103", *_read_wikitext(data_dir)
    else:
        if data_dir is not None:
            raise UsageError(
                f"--data-dir: of no use with --data {data}; leave it out, or add "
                "--data wikitext-103"
            )
        name, train, valid = _read_text(data)
    kind = tokens or ("words" if is_wikitext else "bytes")
    tokenizer = make_tokenizer(kind, train, least=least, lines_are_words=is_wikitext)
    parts = tokenizer.encode(train).ids, tokenizer.encode(valid)
    corpus = Corpus(name, *parts, tokenizer.vocab_size, tokenizer.files())
    for part, ids in (("training", corpus.train), ("validation", corpus.valid.ids)):
        if len(ids) < length + 1:
            raise UsageError(
                f"--data: the {part} text of {corpus.name} has {len(ids)} tokens, "
                f"fewer than the {length + 1} of one sequence; give more text, or a "
                "smaller --length"
            )
        if int(ids.max()) >= corpus.vocab_size:
            raise UsageError(
                f"--tokens: {kind} gives token {ids.max()}, but its vocabulary has "
                f"only {corpus.vocab_size}; use a tokenizer.json that is complete"
            )
    return corpus


def _read_text(data: str) -> tuple[str, bytes, bytes]:
    """The name of a text, and its parts for training and for validation."""
    if data == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = sorted(
            path.relative_to(root)
            for path in root.rglob("*.py")
            if not _LEFT_OUT & set(path.relative_to(root).parts)
        )
        name = "the Python standard library"
    else:
        root, name = Path(data).expanduser(), data
        if root.is_file():
            return name, *_split(_read(root), name)
        if not root.is_dir():
            raise UsageError(
                f"--data: {data} is neither a file nor a directory; give one of text, "
                "`stdlib` or `wikitext-103`"
            )
        found = sorted(
            path.relative_to(root)
            for path in root.rglob("*")
            if path.is_file() and not path.name.startswith(".")
        )
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in found:
        # By the file's name, so that a file more or less moves no other one.
        held_out = zlib.crc32(path.as_posix().encode()) % _VALID_SHARE == 0
        parts[held_out].append(_read(root / path))
    if sum(map(len, parts[False])) == 0 or sum(map(len, parts[True])) == 0:
        if not found:
            raise UsageError(f"--data: {name} holds no files; give a text file")
        return name, *_split(b"".join(parts[False] + parts[True]), name)
    return name, b"".join(parts[False]), b"".join(parts[True])


def _split(text: bytes, name: str) -> tuple[bytes, bytes]:
    """The last part of a text is held out."""
    if not text:
        raise UsageError(f"--data: {name} is empty; give a text file with content")
    cut = len(text) - max(len(text) // _VALID_SHARE, 1)
    while cut > 0 and text[cut] & 0xC0 == 0x80:  # inside a character of UTF-8
        cut -= 1
    return text[:cut], text[cut:]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"--data: cannot read {path}: {error.strerror}") from error


def _read_wikitext(directory: Path) -> tuple[bytes, bytes]:
    """The official token files."""
    texts = []
    for part in ("train", "valid"):
        path = directory / f"wiki.{part}.tokens"
        if not path.is_file():
            raise UsageError(
                f"--data-dir: {path} does not exist; the directory must hold "
                "wiki.train.tokens and wiki.valid.tokens, unpacked"
            )
        texts.append(_read(path))
        if not texts[-1].strip():
            raise UsageError(f"--data-dir: {path} is empty; unpack it again")
    return texts[0], texts[1]


class TrainBatches:
    """Random windows of the training text, a function of seed and step alone."""

    def __init__(self, tokens: np.ndarray, batch_size: int, length: int, seed: int):
        self._tokens, self._seed = tokens, seed
        self._size, self._length = batch_size, length

    def __getitem__(self, index: int, /) -> np.ndarray:
        """Windows of length + 1 tokens, of shape (batch, length + 1)."""
        rng = np.random.default_rng((self._seed, index))
        most = len(self._tokens) - self._length
        starts = rng.integers(most, size=self._size)
        window = np.arange(self._length + 1)
        return self._tokens[starts[:, None] + window].astype(np.int32)


class ValidWindows:
    """Windows spread evenly over the validation text.

    Attributes:
        batches: pairs of windows, of shape (batch, length + 1), and a weight of 0 or 1
            for each row: the last batch is filled up with rows of weight 0.
        size: bytes of text that the predicted tokens stand for.
        words: words that begin in them.
    """

    def __init__(self, tokens: Tokens, batch_size: int, length: int, most: int):
        """Choose the windows, at most `most` of them."""
        count = min((len(tokens.ids) - 1) // length, most)
        last = len(tokens.ids) - length - 1
        starts = np.linspace(0, last, count).astype(np.int64)
        places = starts[:, None] + np.arange(length + 1)
        self.size = int(tokens.sizes[places[:, 1:]].sum())
        self.words = int(tokens.words[places[:, 1:]].sum())
        rows = -(-count // batch_size) * batch_size
        weights = (np.arange(rows) < count).astype(np.float32)
        windows = tokens.ids[np.resize(places, (rows, length + 1))].astype(np.int32)
        parts = rows // batch_size
        self.batches = list(
            zip(np.split(windows, parts), np.split(weights, parts), strict=True)
        )
