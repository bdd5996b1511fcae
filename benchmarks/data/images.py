"""Labelled images: scikit-learn's handwritten digits, and CIFAR-10 read from disk.

Images are kept as they are stored (unsigned bytes, channels first) and normalised where
they are used, so that a whole data set fits on the device.
"""

import dataclasses
import functools as ft
import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np


class DataError(Exception):
    """Data that is missing or not what it should be; the message names the file."""


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set split for training and testing.

    Attributes:
        title: What people call it.
        train_images: Bytes of shape (images, channels, height, width).
        train_labels: Whole numbers below `len(classes)`, of shape (images,).
        test_images: As `train_images`, held out.
        test_labels: As `train_labels`, held out.
        classes: The name of each label.
        white: The byte that stands for full intensity.
    """

    title: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: tuple[str, ...]
    white: int

    @ft.cached_property
    def mean(self) -> np.ndarray:
        """Each channel's mean over the training images, in units of `white`."""
        mean = self.train_images.mean((0, 2, 3), dtype=np.float64)
        return (mean / self.white)[:, None, None]

    @ft.cached_property
    def std(self) -> np.ndarray:
        """Each channel's standard deviation; 1 for a channel that never changes."""
        std = self.train_images.std((0, 2, 3), dtype=np.float64)
        return np.where(std > 0, std / self.white, 1.0)[:, None, None]


# --- digits ---------------------------------------------------------------------------


def load_digits() -> ImageData:
    """The 1797 handwritten digits that come with scikit-learn (8 × 8, grey, 0 to 16).

    The split is always the same: a stratified half of 899 images for testing.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    images = digits.images.astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=0.5, random_state=0, stratify=labels
    )
    return ImageData(
        "Handwritten digits",
        images[train],
        labels[train],
        images[test],
        labels[test],
        classes=tuple(str(i) for i in range(10)),
        white=16,
    )


# --- CIFAR-10 -------------------------------------------------------------------------

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
_TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
_TEST = "test_batch"
_ARCHIVES = {"python": "cifar-10-python.tar.gz", "binary": "cifar-10-binary.tar.gz"}
_FOLDERS = {"python": "cifar-10-batches-py", "binary": "cifar-10-batches-bin"}
_SUFFIX = {"python": "", "binary": ".bin"}
# The official files have 31 MB; what is much larger is not one of them.
_MAX_BYTES = 1 << 29


def load_cifar10(directory: Path) -> ImageData:
    """CIFAR-10 (Krizhevsky 2009) from its official archive, in any of its forms.

    Args:
        directory: Where one of these lies: `cifar-10-batches-py` or
            `cifar-10-batches-bin` (or it is one of these itself), or
            `cifar-10-python.tar.gz` or `cifar-10-binary.tar.gz`. They are looked for in
            this order. Archives are read without unpacking them to disk, and pickles
            without running what they say.

    Returns:
        All training batches joined, and the test batch. A batch may hold any number of
        images (officially 10000), as long as each is whole.

    Raises:
        DataError: if nothing is found, or a file is not what it should be.
    """
    version, files, where = _find(Path(directory))
    read = _read_pickle if version == "python" else _read_records
    suffix = _SUFFIX[version]
    batches = {}
    for name in (*_TRAIN, _TEST):
        if name + suffix not in files:
            raise DataError(
                f"{where} lacks `{name + suffix}`; the official {version} version of "
                f"CIFAR-10 has {', '.join(n + suffix for n in (*_TRAIN, _TEST))}."
            )
        label = f"{where}/{name}{suffix}"
        batches[name] = read(files[name + suffix](), label)
    return ImageData(
        "CIFAR-10",
        np.concatenate([batches[name][0] for name in _TRAIN]),
        np.concatenate([batches[name][1] for name in _TRAIN]),
        *batches[_TEST],
        classes=CIFAR10_CLASSES,
        white=255,
    )


_Files = dict[str, Callable[[], bytes]]


def _find(directory: Path) -> tuple[str, _Files, Path]:
    """The version, its files by name, and where they were found."""
    if not directory.exists():
        raise DataError(
            f"The directory {directory} does not exist; give the one where CIFAR-10's "
            f"archive lies (`{_ARCHIVES['python']}`), compressed or unpacked."
        )
    if not directory.is_dir():
        raise DataError(
            f"{directory} is not a directory; give the directory where CIFAR-10's "
            f"archive (`{_ARCHIVES['python']}`) lies, not the file."
        )
    for version, suffix in _SUFFIX.items():
        for folder in (directory, directory / _FOLDERS[version]):
            names = [name + suffix for name in (*_TRAIN, _TEST)]
            # One of them is enough to recognise it; what is missing is said by name.
            found = [folder / name for name in names if (folder / name).is_file()]
            if found or (folder != directory and folder.is_dir()):
                return version, {path.name: path.read_bytes for path in found}, folder
    for version, archive in _ARCHIVES.items():
        path = directory / archive
        if path.is_file():
            return version, _read_archive(path, _SUFFIX[version]), path
    raise DataError(
        f"{directory} holds no CIFAR-10; looked for the directories "
        f"`{_FOLDERS['python']}` and `{_FOLDERS['binary']}` and the archives "
        f"`{_ARCHIVES['python']}` and `{_ARCHIVES['binary']}`."
    )


def _read_archive(path: Path, suffix: str) -> _Files:
    """The batches in a compressed archive, by name; read to its end, checksum included.

    Nothing is written to disk, so that names in the archive lead nowhere.
    """
    wanted = {name + suffix for name in (*_TRAIN, _TEST)}
    files: _Files = {}
    try:
        with (
            gzip.open(path) as stream,
            tarfile.open(fileobj=stream, mode="r:") as archive,
        ):
            for member in archive:
                name = PurePosixPath(member.name).name
                if name not in wanted or not member.isreg():
                    continue
                if member.size > _MAX_BYTES:
                    raise DataError(f"{path}: `{name}` has {member.size} bytes.")
                content = archive.extractfile(member)
                data = b"" if content is None else content.read()
                files[name] = ft.partial(bytes, data)
            while stream.read(1 << 20):
                pass
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole gzip-compressed tar archive ({error}); "
            "it may have been cut short: get it again."
        ) from error
    return files


def _read_records(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """A batch of the binary version: records of a label and the pixels, in bytes."""
    record = 1 + _PIXELS
    if not content or len(content) % record:
        raise DataError(
            f"{where} has {len(content)} bytes, which is not a whole number of records "
            f"of {record} bytes (a label and an image of 3 × 32 × 32)."
        )
    table = np.frombuffer(content, np.uint8).reshape(-1, record)
    return _checked(table[:, 1:], table[:, 0], where)


def _read_pickle(content: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """A batch of the python version: a pickled dictionary of `data` and `labels`."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a corrupt pickle may raise anything
        raise DataError(
            f"{where} is not a pickled batch of CIFAR-10 "
            f"({type(error).__name__}: {error})."
        ) from error
    if not isinstance(batch, dict):
        raise DataError(f"{where} holds a {type(batch).__name__}, not a dictionary.")
    # Written by Python 2, the names are bytes; written anew, they may be text.
    batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
    for name in ("data", "labels"):
        if name not in batch:
            raise DataError(f"{where} lacks the entry `{name}`.")
    return _checked(batch["data"], batch["labels"], where)


def _checked(images: Any, labels: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise DataError(f"{where}: expected images as bytes (uint8), found {kind}.")
    if images.ndim != 2 or images.shape[1] != _PIXELS or not len(images):
        raise DataError(
            f"{where}: expected images of 3 × 32 × 32 in rows of {_PIXELS} bytes, "
            f"found an array of shape {images.shape}."
        )
    try:
        labels = np.asarray(labels)
    except ValueError:
        labels = np.empty(())
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where}: expected a whole number as label of each of the {len(images)} "
            f"images, found labels of shape {labels.shape} and type {labels.dtype}."
        )
    if labels.min() < 0 or labels.max() > 9:
        wrong = labels[(labels < 0) | (labels > 9)][0]
        raise DataError(f"{where}: expected labels from 0 to 9, found {wrong}.")
    return images.reshape(-1, *_SHAPE), labels.astype(np.int32)


def _whole_number(dtype: np.dtype, content: bytes) -> int:
    if dtype.kind not in "iu":
        raise pickle.UnpicklingError(f"a scalar of type {dtype}")
    return int(np.frombuffer(content, dtype, count=1)[0])


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text encoded as {encoding}")
    return text.encode("latin1")


# What a pickled array needs, whichever version of Python and NumPy wrote it.
_rebuild: Any = np.zeros(1).__reduce__()[0]
_from_buffer: Any = np.zeros(1).__reduce_ex__(5)[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encoded,
}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _rebuild
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _whole_number
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _from_buffer


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays and builtin containers; refuses to call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for `{module}.{name}`, which no batch needs"
            ) from None
