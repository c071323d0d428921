"""A folder of class folders: which files are read, with which labels, and what is refused."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from bigbatch.data import folder, sources, splits
from bigbatch.mistake import Mistake
from tests.data.test_feed import Run, make_config
from tests.data.test_sources import data_config

CLASSES = ("ant", "Bee", "cat")


def picture(number, channels=3, file_format="png"):
    """Of one colour, which says its number."""
    buffer = io.BytesIO()
    pixels = np.full((8, 8, channels), number, np.uint8).squeeze()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path):
    """train/ with 10 pictures a class, named alike in all classes, and val/ with 2."""
    for part, count in (("train", 10), ("val", 2)):
        for label, name in enumerate(CLASSES):
            place = tmp_path / part / name
            place.mkdir(parents=True)
            for number in range(count):
                (place / f"{number}.PNG").write_bytes(picture(50 * label + number))
    return tmp_path


def config_of(root, **changes):
    return data_config(**{
        "name": "folder", "dir": str(root), "test_split": "val", "num_classes": 3,
        "train_examples": 30, "test_examples": 6, "mean": (0.0,) * 3, "std": (1.0,) * 3, **changes})


@pytest.mark.parametrize("channels", [1, 3])
def test_every_file_is_read_once_with_the_class_of_its_folder(root, channels):
    data = config_of(root, mean=(0.0,) * channels, std=(1.0,) * channels)
    dataset = sources.load(data)
    sources.check(dataset, data)
    colours = dataset.train_images[:, 0, 0, 0]
    # The classes by name, as sorted() has it: Bee, ant, cat.
    for label, (name, first) in enumerate((("Bee", 50), ("ant", 0), ("cat", 100))):
        found = colours[dataset.train_labels == label]
        assert sorted(found) == list(range(first, first + 10)), name
    assert len(dataset.test_images) == 6


def test_a_stretch_has_images_of_all_classes_and_is_the_same_each_time(root):
    train, test = folder.open_files(
        config_of(root, train_split="train[:70%]", test_split="train[70%:]"))
    assert (len(train), len(test)) == (21, 9)
    assert set(train.labels) == set(test.labels) == {0, 1, 2}
    names = [example["file_name"] for example in [*train, *test]]
    assert len(set(names)) == 30 and names != sorted(names)
    again, _ = folder.open_files(config_of(root))
    assert [example["file_name"] for example in again] == names
    (root / "train/ant/more.jpg").write_bytes(picture(200, file_format="jpeg"))
    more, _ = folder.open_files(config_of(root))
    assert [e["file_name"] for e in more if e["file_name"] != "ant/more.jpg"] == names


def test_folders_in_class_folders_and_links_are_looked_into_and_hidden_ones_are_not(root):
    deeper = root / "train/ant/images"
    deeper.mkdir()
    (deeper / "deep é.jpeg").write_bytes(picture(1, file_format="jpeg"))
    (root / "train/.hidden").mkdir()
    (root / "train/ant/.DS_Store").write_bytes(b"")
    (root / "train/ant/._0.PNG").write_bytes(b"")
    (root / "train/ant/boxes.txt").write_text("no image")
    (root / "train/ant/linked.png").symlink_to(root / "train/cat/0.PNG")
    (root / "train/ant/images/above").symlink_to("..")  # a circle
    (root / "train/ant/images/all").symlink_to("../..")  # with images of other classes in it
    (root / "more").mkdir()
    (root / "more/1.png").write_bytes(picture(1))
    (root / "train/ant/more").symlink_to(root / "more")
    train, _ = folder.open_files(config_of(root))
    names = {example["file_name"] for example in train}
    assert len(train) == len(names) == 33
    assert {"ant/images/deep é.jpeg", "ant/linked.png", "ant/more/1.png"} < names


def test_a_folder_is_streamed_as_it_is_loaded(root):
    """And in another process, to which the records are sent."""
    taken = {}
    for streaming in (False, True):
        config = make_config(
            str(root), streaming, name="folder", num_classes=3, train_examples=30,
            test_examples=6, test_split="val", train_split="train")
        config.limits.max_batch_size = 12
        run = Run(config)
        batches = [batch for phase, start in run.updates[:2]
                   for batch in run.microbatches(phase, start)]
        taken[streaming] = [np.concatenate(a) for a in zip(*map(run.source, batches), strict=True)]
        run.feed.close()
    np.testing.assert_array_equal(taken[True][0], taken[False][0])
    np.testing.assert_array_equal(taken[True][1], taken[False][1])
    train, _ = folder.open_files(config_of(root))
    assert pickle.loads(pickle.dumps(train))[3] == train[3]


def test_a_file_that_is_faulty_is_named(root):
    (root / "train/cat/3.PNG").write_bytes(picture(3)[:50])
    with pytest.raises(Mistake, match=r"record \d+ \(cat/3.PNG\) of split 'train' of .* no whole"):
        sources.load(config_of(root))
    train, _ = sources.open_records(config_of(root, streaming=True))
    (root / "train/cat/4.PNG").unlink()
    with pytest.raises(RuntimeError, match="train/cat/4.PNG: No such file"):
        list(train)


@pytest.mark.parametrize(("changes", "message"), [
    ({"dir": ""}, "config.data.dir is ''.*must be a folder of each host"),
    ({"dir": "gs://bucket/a"}, "config.data.dir is 'gs://bucket/a'.*a folder of each host"),
    ({"dir": "/no/such"}, "there is no folder /no/such/train; set --config.data.dir"),
    ({"test_split": "test"}, "no folder .*/test; .* holds train, val: set --config.data.test_spl"),
    ({"train_split": "train+val"}, r"no folder .*train\+val; "),
    ({"train_split": "train[:a]"}, "the split 'train.:a.' is not understood"),
    ({"train_split": "train[:1%]"}, "is empty: 'train' has 30 examples"),
    ({"num_classes": 10}, "has 3 class folders: set --config.data.num_classes=3"),
    ({"train_examples": 7}, "split 'train' of folder has 30 examples: set --config.data.train_exa"),
    ({"image_size": 9}, "set --config.data.image_size=8"),
    ({"mean": (0.0,) * 2}, "config.data.mean is .* 1, 3 or 4"),
    ({"train_split": "train/ant", "num_classes": 2}, "train/ant has no class folders"),
])
def test_a_folder_that_is_not_what_the_config_says_is_refused(root, changes, message):
    data = config_of(root, **changes)
    with pytest.raises(Mistake, match=message) as refused:
        sources.check(sources.load(data), data)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("file", "message"), [
    ("train/dog/notes.txt", "train/dog has no JPEG or PNG files: add some, or remove it"),
    ("train/ant/moving.gif", "moving.gif is no JPEG or PNG file"),
    ("val/dog/1.png", "val/dog is the folder of a class that .*train does not have"),
])
def test_a_folder_with_what_does_not_belong_there_is_refused(root, file, message):
    (root / file).parent.mkdir(exist_ok=True)
    (root / file).write_bytes(picture(1))
    with pytest.raises(Mistake, match=message):
        folder.open_files(config_of(root))


@pytest.mark.parametrize("split", [
    "train", "train[:10]", "train[-5:]", "train[5:15]", "train[50%:]", "train[:-10%]",
    "train[:45%]", "train[:55%]", "train[33%:67%]", "train[-30:]", "train[-100%:100%]",
])
def test_a_stretch_is_the_one_that_tfds_reads(split):
    from tensorflow_datasets.core.splits import ReadInstruction

    (read,) = ReadInstruction.from_spec(split).to_absolute({"train": MadeUp})
    numbers = splits.stretch(split, MadeUp.num_examples)
    assert (numbers.start, numbers.stop) == (read.from_ or 0, read.to or MadeUp.num_examples)


@pytest.mark.parametrize("split", [
    "train[]", "train[:]", "train[5]", "train[%:5]", "train[5:50%]", "train[:a]", "train[:5",
    "[:5]", "train[:5]+train[6:]", "train[:5.5%]",
])
def test_what_is_no_stretch_is_refused(split):
    with pytest.raises(Mistake, match="is not understood; it must be a name, or a stretch"):
        splits.stretch(split, MadeUp.num_examples)


@pytest.mark.parametrize("split", ["train[:31]", "train[-31:]", "train[:101%]", "train[-101%:]"])
def test_a_stretch_beyond_its_part_is_refused_as_tfds_refuses_it(split):
    from tensorflow_datasets.core.splits import ReadInstruction

    with pytest.raises(ValueError, match="incompatible with 30 examples|boundaries should be in"):
        ReadInstruction.from_spec(split).to_absolute({"train": MadeUp})
    with pytest.raises(Mistake, match=r"reaches beyond 'train'.* in \[-(100, 100\] %|30, 30\])\."):
        splits.stretch(split, MadeUp.num_examples)


class MadeUp:
    """Of a split, what TFDS asks for."""

    num_examples = 30
