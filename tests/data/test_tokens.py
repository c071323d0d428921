"""Sequences of tokens: what they hold, each once an epoch, in little memory; and refusals."""

import pickle
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from bigbatch.config import base_config
from bigbatch.data import token_files, token_sources, tokens
from bigbatch.mistake import Mistake
from bigbatch.schedule import order
from tests.conftest import REPOSITORY

LENGTH = 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def data_of(name, folder="", classes=1000, length=LENGTH, train=None, test=None, **options):
    data = ConfigDict(base_config().data)
    with data.unlocked():
        data.update({
            "name": name, "dir": str(folder), "num_classes": classes,
            "train_examples": train or 1, "test_examples": test or 1})
        data.options = ConfigDict({"length": length, **options})
    return data


def opened(data):
    """Opens the data with the numbers of sequences that it has."""
    for _ in ("train", "test"):
        try:
            return tokens.open_sequences(data)
        except Mistake as mistake:
            found = re.search(r"set --config.data.(\w+_examples)=(\d+)", str(mistake))
            if not found:
                raise
            data[found[1]] = int(found[2])
    return tokens.open_sequences(data)


def write(path, count, dtype="<u2", seed=0):
    found = np.random.default_rng(seed).integers(0, 1000, count).astype(dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, found)
    else:
        found.tofile(path)
    return found


def rows_of(found, length=LENGTH):
    return np.array([found[at : at + length + 1] for at in range(0, len(found) - length, length)])


# --- what a sequence holds ----------------------------------------------------------------------
@pytest.mark.parametrize(("ending", "dtype"), (
    ("bin", "<u2"), ("bin", "<u4"), ("npy", "<u2"), ("npy", ">u2"), ("npy", "<u4")))
@pytest.mark.parametrize("count", (17, 32, 33, 48, 1000, 1009))
def test_every_token_but_the_first_is_a_target_once(tmp_path, ending, dtype, count):
    found = write(tmp_path / f"train.{ending}", count, dtype)
    write(tmp_path / f"test.{ending}", 100, dtype)
    options = {"dtype": "uint32"} if (ending, dtype) == ("bin", "<u4") else {}
    train, test = opened(data_of("tokens", tmp_path, **options))
    rows = train.take(range(len(train)))
    np.testing.assert_array_equal(rows, rows_of(found))
    np.testing.assert_array_equal(rows[:, 1:].reshape(-1), found[1 : 1 + rows[:, 1:].size])
    assert count - 1 - rows[:, 1:].size < LENGTH
    assert rows.dtype == np.uint16 and len(test) == 6
    np.testing.assert_array_equal(train.read(len(train) - 1, 3, 4)[0]["tokens"], rows[-1])
    # A worker process gets the names of files, and no tokens.
    copied = pickle.dumps(train)
    assert len(copied) < 1000
    np.testing.assert_array_equal(pickle.loads(copied).take([0]), rows[:1])


def test_a_folder_has_the_sequences_of_its_files_by_name(tmp_path):
    parts = [write(tmp_path / "train" / name, count, seed=count) for name, count in (
        ("a.bin", 100), ("b.npy", 53), ("c/d.bin", 10), ("c/e.bin", 81))]
    (tmp_path / "train/notes.md").write_text("no tokens")
    data = data_of("tokens", tmp_path)
    data.update({"train_split": "train[:80%]", "test_split": "train[80%:]"})
    train, test = opened(data)
    whole = np.concatenate([rows_of(part) for part in parts if len(part) > LENGTH])
    kept = round(0.8 * len(whole))
    assert (len(train), len(test)) == (kept, len(whole) - kept)
    mixed = np.random.default_rng(0).permutation(kept)
    np.testing.assert_array_equal(train.take(mixed), whole[mixed])
    np.testing.assert_array_equal(test.take(range(len(test))), whole[kept:])
    for wrong in ([kept], [-1]):
        with pytest.raises(IndexError):
            train.take(wrong)


def test_each_sequence_comes_once_an_epoch_whatever_the_batches(tmp_path):
    """Batches grow, and lie across the ends of epochs, as in a run."""
    write(tmp_path / "train.bin", 1 + 101 * LENGTH)
    write(tmp_path / "test.bin", 100)
    # Tokens that tell where they are from.
    np.arange(1 + 101 * LENGTH, dtype="<u2").tofile(tmp_path / "train.bin")
    train, _ = opened(data_of("tokens", tmp_path, classes=2000))
    position, seen = 0, []
    for batch in (8,) * 7 + (16,) * 5 + (48,) * 4:
        records = order.records(3, position, batch, len(train))
        seen.append(train.take(records[:, 0])[:, 1:])
        position += batch
    targets = np.concatenate(seen)[: 3 * 101].reshape(3, -1)
    for epoch in targets:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(1, 1 + 101 * LENGTH))
    assert not (targets[0] == targets[1]).all()


def test_text_is_its_bytes_and_files_are_kept_apart(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/b.txt").write_bytes("Grüße".encode() + bytes([255, 254]))
    (tmp_path / "train/a.txt").write_text("one line\n" * 5)
    (tmp_path / "train/c.md").write_text("not read")
    (tmp_path / "test.txt").write_text("x" * 40)
    train, test = opened(data_of("text", tmp_path, classes=256, length=4))
    text = b"one line\n" * 5 + b"\0" + "Grüße".encode() + bytes([255, 254])
    np.testing.assert_array_equal(
        train.take(range(len(train))), rows_of(np.frombuffer(text, np.uint8), 4))
    assert train.dtype == np.uint8 and len(test) == 9
    assert isinstance(test.parts[0], token_files.TokenFile)  # one file is mapped
    assert tokens.read_options(data_of("text", classes=256)) == (LENGTH, 0, None, 1.0)


def test_the_standard_library_is_there_without_a_download():
    data = data_of("stdlib", classes=256, length=128, python=platform.python_version())
    data.update({"train_split": "train[:20000]", "test_split": "test[:2000]"})
    train, test = opened(data)
    assert (len(train), len(test)) == (20_000, 2000)
    files = token_sources.standard_library()
    assert not set(files["train"]) & set(files["test"]) and len(files["test"]) >= 15
    assert {path.stem for path in files["train"] + files["test"]} <= sys.stdlib_module_names
    text = train.take(range(1000))[:, :-1].tobytes()
    assert text.startswith(files["train"][0].read_bytes()[:1000])
    assert token_sources.about(data)["python"] == platform.python_version()
    assert len(token_sources.about(data)["train_sha256"]) == 64
    assert token_sources.about(data_of("text")) == {}
    data.options.python = "3.1.4"
    with pytest.raises(Mistake, match="python is '3.1.4', and this is Python .* another text"):
        tokens.open_sequences(data)


# --- a function of one's own ----------------------------------------------------------------------
GIVEN = {}


def load(data):
    return GIVEN["arrays"]


NAME = "tests.data.test_tokens.load"


def test_a_function_gives_tokens_or_whole_rows():
    stream, rows = np.arange(100), np.arange(51).reshape(3, 17)
    for given in ((stream, rows), {"test": rows, "train": stream}):
        GIVEN["arrays"] = given
        train, test = opened(data_of(NAME, mine="of my own"))
        np.testing.assert_array_equal(train.take(range(6)), rows_of(stream))
        np.testing.assert_array_equal(test.take([2, 0]), rows[[2, 0]])
        assert len(test) == 3 and test.dtype == np.uint16


@pytest.mark.parametrize(("given", "text"), (
    (3, "returned a int; it must return two arrays of tokens"),
    ((np.arange(50),), "returned a tuple; it must return two"),
    (([1, 2], np.arange(50)), "the tokens for training are a list; they must be a NumPy array"),
    ((np.arange(50.0), np.arange(50)), "float64 of shape (50,); they must be"),
    ((np.arange(60).reshape(5, 12), np.arange(50)), "(5, 12); they must be a NumPy array of whole"),
    ((np.arange(50) - 1, np.arange(50)), "the data has a token -1; all must lie in [0, 1000)"),
    ((np.arange(50), np.arange(2000)), "the data has a token 1999; all must lie in [0, 1000)"),
    ((np.arange(50), np.arange(16)), "split 'test' of tests.data.test_tokens.load has no whole"),
    ((np.arange(0), np.arange(50)), "the longest of its files has 0 tokens, and a sequence"),
))
def test_what_a_function_may_not_give(given, text):
    GIVEN["arrays"] = given
    with pytest.raises(Mistake, match=re.escape(text)) as refused:
        opened(data_of(NAME))
    assert "\n" not in str(refused.value)


# --- size -----------------------------------------------------------------------------------------
LARGE = """
import os, sys
import numpy as np
from bigbatch.data import token_files, tokens

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssAnon")))

file = token_files.TokenFile(sys.argv[1], "<u2", 0, os.path.getsize(sys.argv[1]) // 2)
whole = tokens.Sequences((file,), 1024, np.dtype(np.uint16), range((file.count - 1) // 1024))
before = resident()
rows = whole.take(np.random.default_rng(0).integers(0, len(whole), 512))
taken = resident() - before
last = whole.take([len(whole) - 1])[0, -1]
most = token_files.largest(file)
print(len(whole), taken, resident() - before, rows.sum(), last, most)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_file_of_gigabytes_is_neither_read_whole_nor_held(tmp_path):
    """A sparse file of 3 GB: 512 sequences of 2 kB touch two pages each; the check one buffer."""
    path = tmp_path / "large.bin"
    count = 1024 * 1_500_000 + 1
    with path.open("wb") as file:
        file.truncate(2 * count)
        file.seek(2 * count - 2)
        file.write(np.array([777], "<u2").tobytes())
    done = subprocess.run([sys.executable, "-c", LARGE, path], text=True, capture_output=True,
                          cwd=REPOSITORY, timeout=240)
    assert done.returncode == 0, done.stderr
    sequences, taken, after, total, last, most = map(int, done.stdout.split())
    assert (sequences, total, last, most) == (1_500_000, 0, 777, 777)
    assert taken < 16_000 and after < 32_000, "kB"


def test_what_was_found_of_a_file_is_remembered_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    write(path, 1000)
    file = token_files.open_file(path, None, 1000, None)
    most = token_files.largest(file)
    assert most == np.fromfile(path, "<u2").max()
    with monkeypatch.context() as patched:
        patched.setattr(token_files.np, "empty", None)  # it is not read again
        assert token_files.largest(file) == most
    np.full(1000, 5, "<u2").tofile(path)
    assert token_files.largest(file) == 5
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # nothing can be kept there
    assert token_files.largest(file) == 5
    monkeypatch.setattr(token_files, "READ_AT_ONCE", 64)
    write(path, 999, seed=4)
    file = token_files.open_file(path, None, 1000, None)
    assert token_files.largest(file) == np.fromfile(path, "<u2").max()


# --- refusals -------------------------------------------------------------------------------------
def refused(data):
    with pytest.raises(Mistake) as raised:
        opened(data)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_files_that_are_none_of_tokens_are_told_by_name(tmp_path):
    write(tmp_path / "test.bin", 100)
    path = tmp_path / "train.bin"
    path.write_bytes(b"abc" * 33)
    assert "train.bin has 99 bytes, which are no whole number of tokens of uint16" in refused(
        data_of("tokens", tmp_path))
    path.write_bytes(b"")
    assert "train.bin is empty: make it again" in refused(data_of("tokens", tmp_path))
    write(path, 16)
    assert "has no whole sequence: the longest of its files has 16 tokens" in refused(
        data_of("tokens", tmp_path))
    write(path, 100)
    assert "config.data.options.dtype is 'int64'; allowed are uint8, uint16, uint32." in refused(
        data_of("tokens", tmp_path, dtype="int64"))
    assert re.search(r"train.bin has a token 9\d\d; all must lie in \[0, 900\)", refused(
        data_of("tokens", tmp_path, classes=900)))
    assert "set --config.data.train_examples=6" in _first(data_of("tokens", tmp_path, train=7))
    path.unlink()
    assert "there is no " in refused(data_of("tokens", tmp_path))
    path.mkdir()
    assert "train.bin has no files *.bin or *.npy" in refused(data_of("tokens", tmp_path))
    assert "config.data.dir is ''" in refused(data_of("tokens"))
    assert "config.data.dir is 'gs://bucket/x'" in refused(data_of("tokens", "gs://bucket/x"))
    assert "config.data.name is 'digits'; for tokens it must be stdlib, text, tokens" in refused(
        data_of("digits"))


def _first(data):
    with pytest.raises(Mistake) as raised:
        tokens.open_sequences(data)
    return str(raised.value)


def test_arrays_of_numpys_that_are_no_tokens_are_told(tmp_path):
    write(tmp_path / "test.npy", 100)
    path = tmp_path / "train.npy"
    for wrong in (np.arange(50), np.arange(50.0), np.ones((2, 50), np.uint16)):
        np.save(path, wrong)
        assert f"train.npy holds {wrong.dtype} of shape {wrong.shape}; tokens must be" in refused(
            data_of("tokens", tmp_path))
    np.save(path, np.arange(50, dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:-9])
    assert "train.npy is cut short: it has 219 bytes and says that it holds 50" in refused(
        data_of("tokens", tmp_path))
    np.save(path, np.zeros(5, np.uint16))
    whole = path.read_bytes()
    for wrong, said in ((b"nothing of NumPy's" * 9, "is no .npy file of NumPy's"),
                        (whole.replace(b"(5,), ", b"(5,,   "), "is no .npy file of NumPy's"),
                        (whole.replace(b"(5,), ", b"(-5,),"), "is empty"),
                        (whole.replace(b"(5,), ", b"(0,), "), "is empty")):
        path.write_bytes(wrong)
        assert f"train.npy {said}" in refused(data_of("tokens", tmp_path))


def test_what_is_said_beside_a_file_must_agree_with_it(tmp_path):
    write(tmp_path / "test.npy", 100)
    write(tmp_path / "train.bin", 100, "<u4")
    beside = tmp_path / "train.bin.json"
    beside.write_text('{"dtype": "uint32", "tokens": 100, "vocabulary": 1000, "separator": 3}')
    train, _ = opened(data_of("tokens", tmp_path, separator=3))
    assert len(train) == 6
    assert "separator is None, but documents in" in refused(data_of("tokens", tmp_path))
    assert "set --config.data.options.separator=3." in refused(
        data_of("tokens", tmp_path, separator=4))
    assert "vocabulary of 1000: set --config.data.num_classes=1000 or more" in refused(
        data_of("tokens", tmp_path, classes=999, separator=3))
    assert "dtype is 'uint16', but by" in refused(
        data_of("tokens", tmp_path, separator=3, dtype="uint16"))
    beside.write_text('{"dtype": "uint32", "tokens": 101}')
    assert "has 100 tokens, and by train.bin.json there must be 101" in refused(
        data_of("tokens", tmp_path))
    for wrong in ("[", "3", "null", "[1]", '{"vocabulary": "1000"}', '{"vocabulary": null}',
                  '{"tokens": "100"}', '{"dtype": ["uint32"]}'):
        beside.write_text(wrong)
        assert "train.bin.json is no JSON of what train.bin holds" in refused(
            data_of("tokens", tmp_path))


@pytest.mark.parametrize(("options", "text"), (
    ({"length": None}, "config.data.options.length is missing; it must be the tokens of a"),
    ({"length": 0}, "config.data.options.length is 0; it must be"),
    ({"length": 1.5}, "config.data.options.length is 1.5; it must be"),
    ({"separator": 1000}, "config.data.options.separator is 1000; it must be a token, 0 or more"),
    ({"padding": -1}, "config.data.options.padding is -1; it must be a token"),
    ({"padding": True}, "config.data.options.padding is True; it must be a token"),
    ({"bytes_per_token": 0}, "config.data.options.bytes_per_token is 0; it must be a number"),
    ({"lenght": 3}, "config.data.options.lenght is unknown; for tokens there are length"),
))
def test_options_of_no_use_are_told_by_their_key(options, text):
    with pytest.raises(Mistake, match=re.escape(text)) as raised:
        tokens.read_options(data_of("tokens", **options))
    assert "\n" not in str(raised.value)
