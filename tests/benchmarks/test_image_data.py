"""The readers of the image data sets, on tiny archives that the tests write."""

import io
import pickle
import struct
import tarfile

import numpy as np
import pytest

from benchmarks.data.images import DataError, load_cifar10, load_digits

NAMES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
FORMS = ("python", "python archive", "binary", "binary archive")
FOLDERS = {"python": "cifar-10-batches-py", "binary": "cifar-10-batches-bin"}


def tiny_batches(per_batch=2):
    rng = np.random.default_rng(0)
    return {
        name: (
            rng.integers(0, 256, (per_batch, 3, 32, 32), np.uint8),
            rng.integers(0, 10, per_batch),
        )
        for name in NAMES
    }


def python_content(images, labels):
    batch = {
        b"batch_label": b"a batch",
        b"labels": labels.tolist(),
        b"data": images.reshape(len(images), -1),
    }
    return pickle.dumps(batch, protocol=2)


def binary_content(images, labels):
    flat = images.reshape(len(images), -1)
    return np.concatenate([labels[:, None].astype(np.uint8), flat], 1).tobytes()


def file_contents(batches, version):
    encode, suffix = {
        "python": (python_content, ""),
        "binary": (binary_content, ".bin"),
    }[version]
    return {name + suffix: encode(*batch) for name, batch in batches.items()}


def write_cifar10(directory, form, contents=None):
    """Write an archive in one of its forms; returns where `--data-dir` points."""
    version = form.split()[0]
    contents = contents or file_contents(tiny_batches(), version)
    directory.mkdir(parents=True, exist_ok=True)
    if form.endswith("archive"):
        path = directory / f"cifar-10-{version}.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name, content in contents.items():
                member = tarfile.TarInfo(f"{FOLDERS[version]}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        folder = directory / FOLDERS[version]
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    return directory


def test_digits_are_split_in_fixed_stratified_halves():
    data, again = load_digits(), load_digits()
    assert data.train_images.shape == (898, 1, 8, 8)
    assert data.test_images.shape == (899, 1, 8, 8)
    assert data.train_images.dtype == np.uint8
    assert data.train_images.max() == data.white == 16
    counts = np.bincount(data.train_labels) - np.bincount(data.test_labels)
    assert np.abs(counts).max() <= 1
    np.testing.assert_array_equal(data.test_images, again.test_images)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_cifar10_reads_the_same(form, tmp_path):
    batches = tiny_batches()
    data = load_cifar10(write_cifar10(tmp_path, form))
    assert data.train_images.shape == (10, 3, 32, 32)
    expected = np.concatenate([batches[name][0] for name in NAMES[:5]])
    np.testing.assert_array_equal(data.train_images, expected)
    np.testing.assert_array_equal(data.test_images, batches["test_batch"][0])
    np.testing.assert_array_equal(data.test_labels, batches["test_batch"][1])
    assert len(list(tmp_path.iterdir())) == 1  # nothing was unpacked
    assert data.mean.shape == data.std.shape == (3, 1, 1)


@pytest.mark.parametrize("version", FOLDERS)
def test_directory_may_be_the_unpacked_one_itself(version, tmp_path):
    write_cifar10(tmp_path, version)
    assert len(load_cifar10(tmp_path / FOLDERS[version]).train_labels) == 10


def python2_pickle(images, labels):
    """What Python 2 wrote, as in the official archive: its text comes back as bytes."""

    def text(value):
        return b"U" + bytes([len(value)]) + value

    data = images.tobytes()
    rows = b"K\x01" + b"K" + bytes([len(images)]) + b"M\x00\x0c\x86"
    dtype = (
        b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + text(b"b")
        + b"\x87R("
        + rows
        + dtype
        + b"\x89T"
        + struct.pack("<i", len(data))
        + data
        + b"tb"
    )
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def newer_pickle(images, labels):
    """What today's Python and NumPy write, labels being NumPy's own numbers."""
    batch = {"data": images.reshape(len(images), -1), "labels": list(labels)}
    return pickle.dumps(batch, protocol=5)


@pytest.mark.parametrize("encode", [python2_pickle, newer_pickle])
def test_pickles_of_old_and_new_versions_read(encode, tmp_path):
    batches = tiny_batches()
    contents = {name: encode(*batch) for name, batch in batches.items()}
    data = load_cifar10(write_cifar10(tmp_path, "python archive", contents))
    np.testing.assert_array_equal(data.test_images, batches["test_batch"][0])
    np.testing.assert_array_equal(data.test_labels, batches["test_batch"][1])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_not_obeyed(tmp_path):
    bad = pickle.dumps(Malicious(tmp_path / "made by the pickle"), protocol=2)
    contents = file_contents(tiny_batches(), "python") | {"data_batch_3": bad}
    write_cifar10(tmp_path / "data", "python", contents)
    with pytest.raises(DataError, match=r"data_batch_3.*asks for"):
        load_cifar10(tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def _batch(**entries):
    images, labels = tiny_batches()["data_batch_1"]
    batch = {b"data": images.reshape(2, -1), b"labels": labels.tolist()}
    changed = {key.encode(): value for key, value in entries.items()}
    return pickle.dumps({**batch, **changed}, protocol=2)


@pytest.mark.parametrize(
    ("version", "content", "message"),
    [
        ("binary", b"\x00" * 3072, "3072 bytes.*records of 3073"),
        ("binary", b"", "0 bytes"),
        ("binary", b"\x0b" + b"\x00" * 3072, "labels from 0 to 9, found 11"),
        ("python", b"not a pickle", "not a pickled batch"),
        ("python", b"", "not a pickled batch"),
        ("python", pickle.dumps([1], 2), "a list, not a dictionary"),
        ("python", pickle.dumps({b"data": 1}, 2), "lacks the entry `labels`"),
        (
            "python",
            _batch(data=np.zeros((2, 3 * 16 * 16), np.uint8)),
            r"3 × 32 × 32.*found an array of shape \(2, 768\)",
        ),
        ("python", _batch(data=np.zeros((2, 3072))), "uint8.*float64"),
        ("python", _batch(labels=[1]), "each of the 2 images"),
        ("python", _batch(labels=[1, -1]), "found -1"),
        ("python", _batch(labels=["a", "b"]), "each of the 2 images"),
    ],
)
def test_what_is_wrong_with_a_batch_is_said(version, content, message, tmp_path):
    name = "data_batch_1" + (".bin" if version == "binary" else "")
    contents = file_contents(tiny_batches(), version) | {name: content}
    write_cifar10(tmp_path, version, contents)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        load_cifar10(tmp_path)


def test_a_missing_batch_is_named(tmp_path):
    contents = file_contents(tiny_batches(), "binary")
    del contents["data_batch_4.bin"]
    write_cifar10(tmp_path, "binary archive", contents)
    with pytest.raises(DataError, match=r"lacks `data_batch_4\.bin`"):
        load_cifar10(tmp_path)


@pytest.mark.parametrize("version", FOLDERS)
@pytest.mark.parametrize("share", [0.5, 0.999])
def test_a_truncated_archive_is_named(version, share, tmp_path):
    write_cifar10(tmp_path, f"{version} archive")
    path = tmp_path / f"cifar-10-{version}.tar.gz"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError, match=f"{path.name} is not a whole gzip"):
        load_cifar10(tmp_path)


def test_an_archive_that_is_none_is_named(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz is not a whole"):
        load_cifar10(tmp_path)


def test_missing_places_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        load_cifar10(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file is not a directory"):
        load_cifar10(tmp_path / "file")
    with pytest.raises(DataError, match="holds no CIFAR-10; looked for"):
        load_cifar10(tmp_path)
