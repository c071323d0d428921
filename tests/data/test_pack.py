"""ArrayRecord files made of a folder: the same records in the same order, or a message."""

import subprocess
import sys

import numpy as np
import pytest

from bigbatch.data import pack, sources
from bigbatch.mistake import Mistake
from tests.conftest import REPOSITORY
from tests.data.test_folder import config_of, picture, root

__all__ = ["root"]  # the fixture


@pytest.fixture
def target(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


def test_packed_files_hold_the_records_of_the_folder_in_its_order(root, target):
    found = pack.pack(root, target, "pets", shard_bytes=500)
    assert found == {"num_classes": 3, "splits": {"train": 30, "val": 6}}
    shards = sorted(path.name for path in (target / "pets/1.0.0").glob("*train*"))
    assert len(shards) > 2 and shards[0].startswith("pets-train.array_record-00000-of-0000")
    for changes in ({}, {"train_split": "train[:40%]", "train_examples": 12}):
        packed = config_of(target, name="pets", **changes)
        for read in (sources.load, sources.open_records):
            for ours, folders in zip(read(packed), read(config_of(root, **changes)), strict=True):
                if isinstance(ours, np.ndarray):
                    np.testing.assert_array_equal(ours, folders)
                    continue
                for one, other in zip(ours, folders, strict=True):
                    assert one["image"] == other["image"] and one["label"] == other["label"]
                    assert one["file_name"].decode() == other["file_name"]
    assert sources.open_tfds(packed).info.features["label"].names == ["Bee", "ant", "cat"]


def test_a_data_set_that_is_there_is_kept_and_one_half_written_is_not(root, target):
    half = target / "pets/1.0.0.unfinished"
    half.mkdir(parents=True)
    (half / "rest").write_text("of a call that was killed")
    pack.pack(root, target, "pets")
    assert [path.name for path in (target / "pets").iterdir()] == ["1.0.0"]
    assert not (target / "pets/1.0.0/rest").exists()
    with pytest.raises(Mistake, match="pets/1.0.0 is there already: take another name, or remove"):
        pack.pack(root, target, "pets")


def test_what_cannot_be_packed_is_told_and_leaves_no_data_set(root, target):
    with pytest.raises(Mistake, match="the name 'My Pets' must be of small letters"):
        pack.pack(root, target, "My Pets")
    with pytest.raises(Mistake, match="there is no folder .*/train/train; the classes are"):
        pack.pack(root / "train", target, "pets")
    (root / "val/dog").mkdir()
    (root / "val/dog/1.png").write_bytes(picture(1))
    with pytest.raises(Mistake, match="val/dog is the folder of a class that .*train does not"):
        pack.pack(root, target, "pets")
    (root / "val/dog/1.png").unlink()
    (root / "val/dog").rmdir()
    (root / "train/ant/gone.png").symlink_to(root / "nowhere")
    with pytest.raises(Mistake, match="cannot be packed into .*pets/1.0.0: .*gone.png"):
        pack.pack(root, target, "pets")
    assert not (target / "pets/1.0.0").exists()


def test_the_command_says_what_to_set_or_what_is_wrong(root, target):
    def called(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "bigbatch.data.pack", *map(str, arguments)],
            capture_output=True, text=True, cwd=REPOSITORY, timeout=120)

    done = called(root, target, "pets")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (f"config.data.name=pets, dir={target}, num_classes=3; "
                           "examples: train 30, val 6\n")
    refused = called(root, target, "pets")
    assert refused.returncode == 2 and refused.stderr.startswith("bigbatch: ")
    assert refused.stderr.count("\n") == 1 and "is there already" in refused.stderr
