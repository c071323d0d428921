"""CIFAR from archives of the published form, with few images, made here to the byte."""

import gzip
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest

from bigbatch.data import cifar, sources
from bigbatch.mistake import Mistake
from tests.data.test_sources import as_png, data_config, pictures, prepare

EACH = 4  # images in a file


def short(text: bytes) -> bytes:
    """A text as Python 2 pickles it."""
    return b"U" + bytes([len(text)]) + text


def as_python2_pickles(batch: dict) -> bytes:
    """A dict of texts, lists of numbers and of texts, and arrays of bytes: protocol 2, Python 2."""
    parts = [b"\x80\x02}("]
    for key, value in batch.items():
        parts.append(short(key))
        if isinstance(value, np.ndarray):
            parts += [
                b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85", short(b"b"),
                b"\x87R(K\x01J", struct.pack("<i", value.shape[0]), b"M",
                struct.pack("<H", value.shape[1]), b"\x86cnumpy\ndtype\n", short(b"u1"),
                b"K\x00K\x01\x87R(K\x03", short(b"|"), b"NNN", b"J\xff\xff\xff\xff" * 2,
                b"K\x00tb\x89T", struct.pack("<i", value.size), value.tobytes(), b"tb"]
        elif isinstance(value, list):
            parts.append(b"](")
            parts += [short(v) if isinstance(v, bytes) else b"K" + bytes([v]) for v in value]
            parts.append(b"e")
        else:
            parts.append(short(value))
    return b"".join([*parts, b"u."])


def content(name: str, form: int) -> dict[str, bytes]:
    """The files of an archive, and readme.html as there is one in it."""
    archive = cifar.ARCHIVES[name][form]
    random = np.random.default_rng(0)
    files = {"readme.html": b"<html>"}
    for file in archive.train + archive.test:
        pixels = random.integers(0, 256, (EACH, 3072), np.uint8)
        fine = random.integers(0, cifar.CLASSES[name], EACH, np.uint8)
        coarse = fine // 5
        if form == 1:
            labels = [fine] if name == "cifar10" else [coarse, fine]
            files[file] = np.column_stack([*labels, pixels]).astype(np.uint8).tobytes()
        else:
            labels = ({b"labels": fine.tolist()} if name == "cifar10" else
                      {b"fine_labels": fine.tolist(), b"coarse_labels": coarse.tolist()})
            files[file] = as_python2_pickles({
                b"batch_label": b"a batch", **labels, b"data": pixels,
                b"filenames": [b"a.png"] * EACH})
    return files


def expected(name: str, form: int) -> sources.Dataset:
    """By another way than the package's: the random numbers once more, pixel by pixel."""
    archive = cifar.ARCHIVES[name][form]
    random = np.random.default_rng(0)
    images, labels = [], []
    for _ in archive.train + archive.test:
        rows = random.integers(0, 256, (EACH, 3072), np.uint8)
        labels.append(random.integers(0, cifar.CLASSES[name], EACH, np.uint8))
        images.append(np.stack([rows[:, plane * 1024:][:, :1024].reshape(EACH, 32, 32)
                                for plane in range(3)], axis=-1))
    many = EACH * len(archive.train)
    images, labels = np.concatenate(images), np.concatenate(labels)
    return sources.Dataset(images[:many], labels[:many], images[many:], labels[many:])


def write(root, name: str, form: int, packed: bool, changes=()) -> None:
    archive = cifar.ARCHIVES[name][form]
    files = {**content(name, form), **dict(changes)}
    if not packed:
        (root / archive.folder).mkdir()
        for file, data in files.items():
            (root / archive.folder / file).write_bytes(data)
        return
    with tarfile.open(root / archive.packed, "w:gz") as tar:
        for file, data in files.items():
            member = tarfile.TarInfo(f"{archive.folder}/{file}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def config_of(root, name="cifar10", **changes):
    return data_config(**{
        "name": name, "dir": str(root), "num_classes": cifar.CLASSES[name], "image_size": 32,
        "train_examples": 20 if name == "cifar10" else 4, "test_examples": 4,
        "mean": (0.0,) * 3, "std": (1.0,) * 3, **changes})


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("form", [0, 1], ids=["python", "binary"])
@pytest.mark.parametrize("packed", [True, False])
def test_an_original_archive_is_read_to_the_pixel(tmp_path, name, form, packed):
    write(tmp_path, name, form, packed)
    data = config_of(tmp_path, name)
    dataset = sources.load(data)
    sources.check(dataset, data)
    for field, array in expected(name, form)._asdict().items():
        np.testing.assert_array_equal(getattr(dataset, field), array, err_msg=field)


def test_the_pickles_made_here_are_those_of_the_published_form(tmp_path):
    """Python's own unpickler, which the package does not use, reads the same from them."""
    batch = pickle.loads(content("cifar100", 0)["train"], encoding="bytes")
    assert set(batch) == {b"batch_label", b"fine_labels", b"coarse_labels", b"data", b"filenames"}
    assert batch[b"data"].shape == (EACH, 3072) and batch[b"data"].dtype == np.uint8


def test_a_part_of_a_split_is_a_part_of_the_archive(tmp_path):
    write(tmp_path, "cifar10", 1, True)
    dataset = sources.load(config_of(
        tmp_path, train_split="train[:75%]", test_split="train[75%:]"))
    whole = expected("cifar10", 1)
    np.testing.assert_array_equal(dataset.train_images, whole.train_images[:15])
    np.testing.assert_array_equal(dataset.test_labels, whole.train_labels[15:])


def test_a_data_set_of_tfds_goes_before_an_archive(tmp_path):
    write(tmp_path, "cifar10", 1, False)
    prepare(tmp_path, [as_png(picture) for picture in pictures(3)])
    assert sources.load(config_of(tmp_path)).train_images.shape == (3, 8, 8, 1)


class Calls:
    def __reduce__(self):
        return os.mkdir, ("called",)


@pytest.mark.parametrize("bad", [
    pickle.dumps({b"data": Calls(), b"labels": [1]}),
    b"cos\nmkdir\n(S'called'\ntR.",
    b"\x80\x02cnumpy\nfromfile\nU\x01x\x85R.",
    pickle.dumps({b"data": np.array([Calls()], object), b"labels": [1]}, protocol=2),
])
def test_a_pickle_that_would_call_something_is_refused_and_calls_nothing(
    tmp_path, monkeypatch, bad
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "cifar10", 0, True, {"data_batch_3": bad})
    with pytest.raises(Mistake, match="tar.gz: data_batch_3 is no batch.*it wants to call"):
        sources.load(config_of(tmp_path))
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("form", "change", "message"), [
    (0, {"test_batch": as_python2_pickles({b"labels": [1]})}, "test_batch is no batch of images"),
    (0, {"test_batch": content("cifar10", 0)["test_batch"][:9000]}, "test_batch is no batch of"),
    (0, {"test_batch": b""}, "test_batch is no batch of images"),
    (0, {"test_batch": pickle.dumps([1, 2])}, "test_batch is no batch of images"),
    (1, {"test_batch.bin": bytes(3073 + 5)}, "test_batch.bin has 3078 bytes, .*records of 3073"),
    (1, {"test_batch.bin": b""}, "test_batch.bin has 0 bytes"),
    (1, {"test_batch.bin": b"\x0b" + bytes(3072)}, "test_labels run from 11 to 11"),
])
def test_a_faulty_file_of_an_archive_is_named(tmp_path, packed, form, change, message):
    write(tmp_path, "cifar10", form, packed, change)
    with pytest.raises(Mistake, match=message) as refused:
        sources.load(config_of(tmp_path))
    assert "\n" not in str(refused.value)


def test_an_archive_cut_short_or_without_a_file_is_named(tmp_path):
    write(tmp_path, "cifar10", 0, True)
    path = tmp_path / "cifar-10-python.tar.gz"
    whole = path.read_bytes()
    for bad in (whole[: len(whole) // 2], b"<html>", b"", gzip.compress(b"no archive")):
        path.write_bytes(bad)
        with pytest.raises(Mistake, match=r"cifar-10-python.tar.gz (is no whole archive|has no f)"):
            sources.load(config_of(tmp_path))
    path.unlink()
    write(tmp_path, "cifar10", 0, False)
    (tmp_path / "cifar-10-batches-py/data_batch_2").unlink()
    with pytest.raises(Mistake, match="cifar-10-batches-py/data_batch_2 cannot be read .No such"):
        sources.load(config_of(tmp_path))


def test_what_an_archive_does_not_have_is_refused(tmp_path):
    write(tmp_path, "cifar10", 0, True)
    for changes, message in (
        ({"num_classes": 100}, "cifar10 has 10 classes: set --config.data.num_classes=10"),
        ({"test_split": "validation"}, "cifar10 has no split 'validation'; it has train, test"),
        ({"train_split": "train[:0]"}, "the split 'train.:0.' is empty"),
    ):
        with pytest.raises(Mistake, match=message):
            sources.load(config_of(tmp_path, **changes))
    with pytest.raises(Mistake, match="cifar10 in .*tar.gz is none: set --config.data.streaming=F"):
        sources.open_records(config_of(tmp_path, streaming=True))
    with pytest.raises(Mistake, match="Or put cifar-100-python.tar.gz, from https.*, into it"):
        sources.load(config_of(tmp_path, "cifar100"))
