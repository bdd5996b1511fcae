"""Text as tokens: the standard library's sources, any files, or WikiText-103."""

import collections
import dataclasses
import sysconfig
import zlib
from pathlib import Path

import numpy as np

from ._errors import UsageError

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
        token_bytes: how many bytes of text each token of the vocabulary stands for.
        vocabulary: the words; None: tokens are bytes.
    """

    name: str
    train: np.ndarray
    valid: np.ndarray
    token_bytes: np.ndarray
    vocabulary: list[str] | None

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary."""
        return len(self.token_bytes)


def load_corpus(data: str, data_dir: Path | None, length: int) -> Corpus:
    """The corpus that `--data` names.

    Raises:
        UsageError: if it is missing, empty or unreadable.
    """
    if data == "wikitext-103":
        if data_dir is None:
            raise UsageError(
                "--data-dir: missing; --data wikitext-103 is read from disk, so give "
                "the directory that holds wiki.train.tokens and wiki.valid.tokens"
            )
        corpus = _load_wikitext(data_dir)
    else:
        if data_dir is not None:
            raise UsageError(
                f"--data-dir: of no use with --data {data}; leave it out, or add "
                "--data wikitext-103"
            )
        corpus = _load_bytes(data)
    for name, tokens in (("training", corpus.train), ("validation", corpus.valid)):
        if len(tokens) < length + 1:
            raise UsageError(
                f"--data: the {name} text of {corpus.name} has {len(tokens)} tokens, "
                f"fewer than the {length + 1} of one sequence; give more text, or a "
                "smaller --length"
            )
    return corpus


def _load_bytes(data: str) -> Corpus:
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
            return _split_file(root)
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
        everything = b"".join(parts[False] + parts[True])
        return _split(everything, name)
    return _byte_corpus(name, b"".join(parts[False]), b"".join(parts[True]))


def _split_file(path: Path) -> Corpus:
    return _split(_read(path), str(path))


def _split(text: bytes, name: str) -> Corpus:
    """The last part of a text is held out."""
    if not text:
        raise UsageError(f"--data: {name} is empty; give a text file with content")
    cut = len(text) - max(len(text) // _VALID_SHARE, 1)
    return _byte_corpus(name, text[:cut], text[cut:])


def _byte_corpus(name: str, train: bytes, valid: bytes) -> Corpus:
    tokens = lambda text: np.frombuffer(text, np.uint8)
    return Corpus(name, tokens(train), tokens(valid), np.ones(256, np.int32), None)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"--data: cannot read {path}: {error.strerror}") from error


def _load_wikitext(directory: Path) -> Corpus:
    """The official token files; the vocabulary is that of the training text."""
    texts = {}
    for part in ("train", "valid"):
        path = directory / f"wiki.{part}.tokens"
        if not path.is_file():
            raise UsageError(
                f"--data-dir: {path} does not exist; the directory must hold "
                "wiki.train.tokens and wiki.valid.tokens, unpacked"
            )
        try:
            texts[part] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--data-dir: cannot read {path}: {error}") from error
    words = {part: _words(text) for part, text in texts.items()}
    counts = collections.Counter(words["train"])
    if not counts:
        raise UsageError(f"--data-dir: {directory}/wiki.train.tokens is empty")
    # By falling frequency, ties by spelling, as an adaptive softmax expects them.
    vocabulary = sorted(counts, key=lambda word: (-counts[word], word))
    index = {word: i for i, word in enumerate(vocabulary)}
    unknown = index.get("<unk>")
    missing = sorted(set(words["valid"]) - set(index))
    if missing and unknown is None:
        raise UsageError(
            f"--data-dir: `{missing[0]}` of wiki.valid.tokens does not occur in "
            "wiki.train.tokens, which has no <unk> either; the files do not belong "
            "together"
        )
    encode = lambda part: np.array(
        [index.get(word, unknown) for word in words[part]], np.int32
    )
    token_bytes = np.array([len(word.encode()) + 1 for word in vocabulary], np.int32)
    token_bytes[index["<eos>"]] = 1
    train, valid = encode("train"), encode("valid")
    return Corpus("WikiText-103", train, valid, token_bytes, vocabulary)


def _words(text: str) -> list[str]:
    return [w for line in text.splitlines() for w in (*line.split(), "<eos>")]


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


def valid_batches(
    tokens: np.ndarray, batch_size: int, length: int, most: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Windows spread evenly over the validation text, at most `most` of them.

    Returns:
        Pairs of windows, of shape (batch, length + 1), and a weight of 0 or 1 for each
        row: the last batch is filled up with rows of weight 0.
    """
    count = min((len(tokens) - 1) // length, most)
    last = len(tokens) - length - 1
    starts = np.linspace(0, last, count).astype(np.int64)
    rows = -(-count // batch_size) * batch_size
    weights = (np.arange(rows) < count).astype(np.float32)
    starts = np.resize(starts, rows)
    windows = tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)
    pairs = zip(
        np.split(windows, rows // batch_size),
        np.split(weights, rows // batch_size),
        strict=True,
    )
    return list(pairs)
