"""Where examples come from: digits, TFDS, functions of the user's; and what each refuses."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from bigbatch.config import base_config, set_from_text
from bigbatch.data import decode, smaller, sources
from bigbatch.dotted import resolve
from bigbatch.mistake import Mistake
from tests.support import configs
from tests.support.sample_data import data_dir


def data_config(**changes):
    data = base_config().data
    data.augment.update(changes.pop("augment", {}))
    data.update(changes)
    return data


def test_the_digits_are_all_there_and_split_for_good():
    from sklearn.datasets import load_digits

    data = data_config()
    dataset = sources.load(data)
    sources.check(dataset, data)
    digits = load_digits()
    test = np.arange(1797) % 5 == 0
    for images, labels, chosen in (
        (dataset.train_images, dataset.train_labels, ~test),
        (dataset.test_images, dataset.test_labels, test),
    ):
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(images[..., 0] / 15, digits.images[chosen])
        np.testing.assert_array_equal(labels, digits.target[chosen])
    assert [len(array) for array in dataset] == [1437, 1437, 360, 360]


CIFAR_TRIAL = """
import json, sys
import numpy as np
from bigbatch.data import sources
from configs.cifar10 import get_config
data = get_config("increase,data.dir=" + sys.argv[1]).data
dataset = sources.load(data)
sources.check(dataset, data)
print(json.dumps({
    "shapes": [a.shape for a in dataset], "types": [str(a.dtype) for a in dataset],
    "classes": [np.bincount(a).tolist() for a in (dataset.train_labels, dataset.test_labels)],
    "mean": dataset.train_images.mean((0, 1, 2)).tolist(),
    "tensorflow": "tensorflow" in sys.modules,
}))
"""


def test_cifar10_loads_whole_and_without_tensorflow():
    folder = data_dir("cifar10")
    done = subprocess.run(
        [sys.executable, "-c", CIFAR_TRIAL, folder], capture_output=True, text=True,
        cwd=Path(__file__).parents[2], timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "OpenCV" not in done.stderr
    found = json.loads(done.stdout)
    assert found["shapes"] == [[50_000, 32, 32, 3], [50_000], [10_000, 32, 32, 3], [10_000]]
    assert found["types"] == ["uint8", "int32"] * 2
    assert found["classes"] == [[5000] * 10, [1000] * 10]
    # The published means; compression moves them by less than one grey level.
    np.testing.assert_allclose(found["mean"], (125.3, 123.0, 113.9), atol=1.0)
    assert not found["tensorflow"]


def test_records_of_a_split_come_as_bytes_to_decode():
    """What streaming input shares: photographs of any size, one by one."""
    data = data_config(
        name="imagenet2012", dir=data_dir("imagenet2012"), num_classes=1000,
        test_split="validation",
    )
    records = sources.tfds_records(sources.open_tfds(data), data.name, "train")
    pixels = sources.decode(records[0]["image"], 3)
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    assert 0 <= records[0]["label"] < 1000
    with pytest.raises(ValueError, match="more than one shape.*streaming=True"):
        sources.load(data)


def as_png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, "png")
    return buffer.getvalue()


def prepare(
    folder, images, name="cifar10", file_format="array_record", label="label", channels=1
):
    """A TFDS data set in `folder` as TFDS would write it: two splits with the same images.

    Args:
        images: encoded; image i has the label i % 10.
        channels: of the images, as the features say.
    """
    version = folder / name / "3.0.2"
    version.mkdir(parents=True)
    kinds = "tensorflow_datasets.core.features"
    features = {
        "image": {
            "pythonClassName": f"{kinds}.image_feature.Image",
            "image": {"dtype": "uint8", "encodingFormat": "png",
                      "shape": {"dimensions": ["-1", "-1", str(channels)]}},
        },
        label: {
            "pythonClassName": f"{kinds}.class_label_feature.ClassLabel",
            "classLabel": {"numClasses": "10"},
        },
    }
    (version / "features.json").write_text(json.dumps({
        "pythonClassName": f"{kinds}.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }))
    (version / "dataset_info.json").write_text(json.dumps({
        "name": name, "version": "3.0.2", "fileFormat": file_format,
        "splits": [
            {"name": split, "numBytes": "1", "shardLengths": [str(len(images))],
             "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"}
            for split in ("train", "test")
        ],
    }))
    for split in ("train", "test"):
        path = version / f"{name}-{split}.{file_format}-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for number, encoded in enumerate(images):
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(encoded)
            example.features.feature[label].int64_list.value.append(number % 10)
            writer.write(example.SerializeToString())
        writer.close()
    return version


def pictures(count, side=8):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 1), dtype=np.uint8)


def test_a_prepared_data_set_is_read_to_the_pixel(tmp_path):
    images = pictures(2500)  # more than are read at once
    prepare(tmp_path, [as_png(image) for image in images])
    dataset = sources.load(data_config(name="cifar10", dir=str(tmp_path), test_split="test[1:3]"))
    np.testing.assert_array_equal(dataset.train_images, images)
    np.testing.assert_array_equal(dataset.train_labels, np.arange(2500) % 10)
    np.testing.assert_array_equal(dataset.test_images, images[1:3])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("file_format", ["png", "tiff"])
def test_a_grey_image_of_16_bits_is_read_by_its_upper_8(file_format, channels):
    pixels = np.array([[0, 255, 256, 32768, 65279, 65535]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    found = sources.decode(buffer.getvalue(), channels)
    np.testing.assert_array_equal(found, (pixels >> 8)[..., None].repeat(channels, 2))
    if file_format == "png":  # as the same image is streamed
        streamed = decode.decode(buffer.getvalue(), (0, 0, 6, 1), 6, "bilinear")
        np.testing.assert_array_equal(streamed[0, :, :channels], found[0])


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_an_image_of_32_bits_a_pixel_is_refused(kind):
    buffer = io.BytesIO()
    Image.fromarray(np.ones((2, 2), kind)).save(buffer, "tiff")
    with pytest.raises(Mistake, match="TIFF image of 32 bits a pixel.*save it with 8 bits"):
        sources.decode(buffer.getvalue(), 1)


@pytest.mark.parametrize(("header", "message"), [
    (struct.pack(">II5B", 60_000, 60_000, 8, 0, 0, 0, 0), "no whole image: Image size"),
    (struct.pack(">II", 8, 8), "no whole image: Truncated IHDR chunk"),
])
def test_an_image_that_pillow_refuses_is_refused_in_one_line(header, message):
    chunk = b"IHDR" + header
    encoded = as_png(pictures(1)[0])
    spoiled = (encoded[:8] + struct.pack(">I", len(header)) + chunk
               + struct.pack(">I", zlib.crc32(chunk)) + encoded[33:])
    with pytest.raises(Mistake, match=message):
        sources.decode(spoiled, 1)


def refusal(**changes):
    with pytest.raises(ValueError) as refused:
        sources.load(data_config(**changes))
    return str(refused.value)


def test_an_absent_data_set_says_how_to_prepare_it_and_is_not_downloaded(tmp_path):
    folder = tmp_path / "data"
    message = refusal(name="cifar10", dir=str(folder))
    assert f"cifar10 is not in {folder} (there is no such folder)" in message
    assert "python -m pip install tensorflow tensorflow-datasets array_record" in message
    assert f"tfds.builder('cifar10', data_dir='{folder}', file_format='array_record')" in message
    assert not folder.exists()
    prepare(folder, [as_png(pictures(1)[0])], name="mnist")
    before = sorted(folder.rglob("*"))
    assert "prepared there: mnist:3.0.2" in refusal(name="cifar10", dir=str(folder))
    assert "prepared there: mnist:3.0.2" in refusal(name="mnist:9.9.9", dir=str(folder))
    assert sorted(folder.rglob("*")) == before


def test_an_unknown_name_is_refused_in_one_line(tmp_path):
    for name, hint in (("cifar1O", "cifar10"), ("Digits", "digits"), ("no such thing!", "")):
        message = refusal(name=name, dir=str(tmp_path))
        assert message.startswith(f"config.data.name is {name!r}; it must be 'digits'")
        assert "\n" not in message and hint in message


def test_another_file_format_says_so_and_how_to_prepare_again(tmp_path):
    version = prepare(tmp_path, [as_png(pictures(1)[0])], file_format="tfrecord")
    message = refusal(name="cifar10", dir=str(tmp_path))
    assert f"cifar10 in {version} is prepared as tfrecord" in message
    assert "file_format='array_record'" in message
    assert f"download_and_prepare(download_dir='{tmp_path / 'downloads'}')" in message


def test_faulty_tfds_data_is_named(tmp_path):
    good = [as_png(image) for image in pictures(3)]
    prepare(tmp_path / "mixed", [*good, as_png(pictures(1, side=9)[0])])
    prepare(tmp_path / "cut", [*good, good[0][:100]])
    prepare(tmp_path / "noise", [*good, b"no image"])
    prepare(tmp_path / "lost", good).joinpath("cifar10-train.array_record-00000-of-00001").unlink()
    prepare(tmp_path / "unlabelled", good, label="digit")
    for folder, message in (
        ("mixed", "record 0 is 8x8, record 3 9x9.*set --config.data.streaming=True"),
        ("cut", "record 3 of split 'train' of cifar10 is 100 bytes that are no whole image"),
        ("noise", "record 3 of split 'train' of cifar10 is 8 bytes that are no whole image"),
        ("lost", "split 'train' of cifar10 cannot be read.*array_record-00000-of-00001"),
        ("unlabelled", "cifar10 is no data set of labelled images.*other labels.*'digit': Class"),
    ):
        with pytest.raises(ValueError, match=message):
            sources.load(data_config(name="cifar10", dir=str(tmp_path / folder)))
    good = {"name": "cifar10", "dir": str(tmp_path / "mixed")}
    for split in ("validation", "all[:50%]"):
        assert f"no split {split!r}; it has train, test" in refusal(**good, test_split=split)
    for split in ("train[:0]", "train[3:1]", "train[50%:20%]"):
        assert f"{split!r} of cifar10 is empty" in refusal(**good, train_split=split)
    assert "set --config.data.num_classes=10" in refusal(**good, num_classes=7)
    assert "have the splits 'train' and 'test' only" in refusal(train_split="train[:5]")


SHARD = "cifar10-train.array_record-00000-of-00001"


def of_no_records(file):
    ArrayRecordWriter(str(file), "group_size:1").close()


def cut_to(size):
    return lambda file: file.write_bytes(file.read_bytes()[:size])


def of_records(*records):
    def write(file):
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
    return write


@pytest.mark.parametrize("open_it", [sources.load, sources.open_records])
@pytest.mark.parametrize(("name", "spoil", "message"), [
    (SHARD, of_no_records, "has 0 records, and dataset_info.json says 60"),
    (SHARD, of_records(b"", b""), "has 2 records, and dataset_info.json says 60"),
    (SHARD, cut_to(1 << 16), "is cut short or damaged"),
    (SHARD, cut_to(100_000), "Corrupted"),
    (SHARD, cut_to(0), "at least 64KB"),
    (SHARD, Path.unlink, "is absent"),
    (SHARD, of_records(*[b"\x99nonsense"] * 60), "Error parsing message"),
    (SHARD, of_records(*[b""] * 60), "the record has no image"),
    ("dataset_info.json", cut_to(60), "is no whole JSON file"),
    ("dataset_info.json", cut_to(0), "is no whole JSON file"),
    ("dataset_info.json", Path.unlink, "is absent"),
    ("features.json", cut_to(60), "is no whole JSON file"),
    ("features.json", Path.unlink, "is absent"),
    ("features.json", lambda file: file.write_text("{}"), "cannot be opened"),
])
def test_a_file_of_a_data_set_that_is_faulty_is_named(tmp_path, open_it, name, spoil, message):
    noise = [np.random.default_rng(number).bytes(3000) for number in range(60)]
    file = prepare(tmp_path, noise, channels=3) / name
    spoil(file)
    with pytest.raises(Mistake) as refused:
        open_it(streamed(dir=str(tmp_path), train_examples=60, test_examples=60))
    text = str(refused.value)
    assert message in text and "\n" not in text and "prepared there" not in text
    assert str(file if message != "cannot be opened" else file.parent) in text


def test_of_many_faulty_files_one_is_named_and_the_others_are_counted(tmp_path):
    version = prepare(tmp_path, [b"image"] * 3, channels=3)
    info = json.loads((version / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["1", "1", "1"]
    (version / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(Mistake, match="-00000-of-00003 is absent .and 2 more files are faulty."):
        sources.open_records(streamed(dir=str(tmp_path)))


# --- streamed ------------------------------------------------------------------------------------
def streamed(**changes):
    return data_config(**{
        "name": "cifar10", "streaming": True, "train_examples": 3, "test_examples": 3,
        "mean": (0.0,) * 3, "std": (1.0,) * 3, **changes,
    })


def test_streamed_records_are_opened_without_decoding_them(tmp_path):
    prepare(tmp_path, [b"first", b"second", b"third"], channels=3)
    train, test = sources.open_records(
        streamed(dir=str(tmp_path), test_split="test[1:]", test_examples=2))
    assert [(record["image"], record["label"]) for record in train] == [
        (b"first", 0), (b"second", 1), (b"third", 2)]
    assert [record["image"] for record in test] == [b"second", b"third"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"name": "digits"}, "digits is none: set --config.data.streaming=False"),
    ({"name": "my_data.make"}, "my_data.make is none: set --config.data.streaming=False"),
    ({"train_examples": 4}, "split 'train' of cifar10 has 3 .*set --config.data.train_examples=3"),
    ({"test_examples": 2}, "set --config.data.test_examples=3"),
    ({"test_split": "validation"}, "no split 'validation'; it has train, test"),
    ({"mean": (0.0,)}, "config.data.mean is .0.0,., but .* 3 channels"),
    ({"image_size": 8, "augment": {"crop": 6}}, "image_size is 8, but .* cropped to 6x6"),
    ({"augment": {"crop": 8, "pad": 8}}, "a pad of at most 7"),
])
def test_streams_that_are_not_what_the_config_says_are_refused(tmp_path, changes, message):
    prepare(tmp_path, [b""] * 3, channels=3)
    with pytest.raises(ValueError, match=message):
        sources.open_records(streamed(dir=str(tmp_path), **changes))


def test_streams_of_grey_images_and_of_lost_files_are_refused(tmp_path):
    prepare(tmp_path / "grey", [b""] * 3)
    with pytest.raises(ValueError, match="only images of 3 channels can be streamed .* has 1"):
        sources.open_records(streamed(dir=str(tmp_path / "grey")))
    version = prepare(tmp_path / "lost", [b""] * 3, channels=3)
    version.joinpath("cifar10-test.array_record-00000-of-00001").unlink()
    with pytest.raises(ValueError, match="split 'test' of cifar10 cannot be read.*array_record"):
        sources.open_records(streamed(dir=str(tmp_path / "lost")))


# --- a function of the user's --------------------------------------------------------------------
ARRAYS = {
    "train_images": pictures(6), "train_labels": np.arange(6),
    "test_images": pictures(2), "test_labels": np.array([0, 9], np.uint8),
}


@pytest.fixture
def returning(monkeypatch, tmp_path):
    """Makes `my_data.make` return something, and gives its dotted path."""
    (tmp_path / "my_data.py").write_text("ANSWER = None\ndef make(data):\n    return ANSWER\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_data", raising=False)

    def answer(value):
        import my_data

        my_data.ANSWER = value
        return "my_data.make"

    yield answer
    sys.modules.pop("my_data", None)


@pytest.mark.parametrize("pack", [
    dict, lambda a: tuple(a.values()), lambda a: list(a.values()), lambda a: sources.Dataset(**a),
])
def test_a_function_of_the_users_gives_the_arrays(returning, pack):
    data = data_config(name=returning(pack(ARRAYS)), train_examples=6, test_examples=2)
    dataset = sources.load(data)
    sources.check(dataset, data)
    for field, array in ARRAYS.items():
        np.testing.assert_array_equal(getattr(dataset, field), array, err_msg=field)
    assert dataset.test_labels.dtype == np.int32


@pytest.mark.parametrize(("change", "message"), [
    ({"train_images": np.zeros((6, 8, 8, 1), np.float32)}, "train_images are float32"),
    ({"test_images": np.zeros((2, 8, 8), np.uint8)}, r"test_images have the shape \(2, 8, 8\)"),
    ({"test_images": np.zeros((2, 9, 8, 1), np.uint8)}, ".*they must be alike"),
    ({"train_labels": np.arange(5)}, r"train_labels are int64 of shape \(5,\)"),
    ({"train_labels": np.arange(6.0)}, "train_labels are float64.*several labels an image are"),
    ({"train_labels": np.eye(6, dtype=int)}, r"train_labels are int64 of shape \(6, 6\).*several"),
    ({"train_images": [np.zeros((8, 8, 1), np.uint8), np.zeros((9, 8, 1), np.uint8)]},
     "train_images cannot be made one array.*Images must be of one size"),
    ({"train_images": [np.zeros((8, 8, 1), np.uint8), None]}, "train_images cannot be made one"),
    ({"test_labels": [[0], [1, 2]]}, "test_labels cannot be made one array.*one whole number"),
    ({"test_labels": np.array([0, 10])}, r"test_labels run from 0 to 10; .* \[0, 10\)"),
    ({"test_labels": np.array([-1, 3])}, "test_labels run from -1 to 3"),
])
def test_faulty_arrays_name_the_function_and_the_fault(returning, change, message):
    with pytest.raises(ValueError, match=rf"^my_data\.make: {message}"):
        sources.load(data_config(name=returning(ARRAYS | change)))


def test_a_function_of_the_users_has_options_of_its_own(monkeypatch, tmp_path):
    (tmp_path / "my_data.py").write_text("def make(data):\n    raise ValueError(data.options)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_data", raising=False)
    config = base_config()
    config.data.name = "my_data.make"
    set_from_text(config, "data.options.root", "/photos")
    set_from_text(config, "data.options.folds", "(1, 2)")
    with pytest.raises(ValueError) as called:
        sources.load(config.data)
    sys.modules.pop("my_data", None)
    assert called.value.args[0].to_dict() == {"root": "/photos", "folds": (1, 2)}


@pytest.mark.parametrize(("answer", "message"), [
    (None, "a NoneType"), ((1, 2), "a tuple of 2"), ({"images": 1}, "a dict of images"),
])
def test_a_function_that_gives_no_arrays_is_refused(returning, answer, message):
    assert f"my_data.make returned {message}; it must" in refusal(name=returning(answer))


@pytest.mark.parametrize(("path", "message"), [
    ("digits", "must be a dotted path"), ("a..b", "must be a dotted path"),
    ("no_such_package.module.make", "there is no module 'no_such_package'.*PYTHONPATH"),
    ("bigbatch.no_such_module.make", "there is no module 'bigbatch.no_such_module'"),
    ("bigbatch.dotted.resolv", "'bigbatch.dotted' has no 'resolv'. Did you mean resolve?"),
    ("os.path.sep", "cannot be called"),
])
def test_dotted_paths_that_lead_nowhere_say_which_part_is_missing(path, message):
    with pytest.raises(ValueError, match=rf"^config\.network is '{path}'.*(?:{message})"):
        resolve(path, "config.network")


def test_an_error_inside_the_users_module_is_shown_as_it_is(monkeypatch, tmp_path):
    (tmp_path / "my_broken_data.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        resolve("my_broken_data.make", "config.data.name")
    assert resolve("bigbatch.dotted.resolve", "config.network") is resolve


# --- the data against the config -----------------------------------------------------------------
@pytest.mark.parametrize(("changes", "message"), [
    ({"train_examples": 1400}, "train_examples is 1400 but split 'train' of digits has 1437 "
                               "examples: set --config.data.train_examples=1437"),
    ({"test_examples": 1}, "set --config.data.test_examples=360"),
    ({"mean": (1.0, 2.0)}, "config.data.mean is .1.0, 2.0., but .* 1 channel:"),
    ({"std": ()}, "config.data.std is .., but"),
    ({"image_size": 9}, "is 9, but .* are 8x8, uncropped: set --config.data.image_size=8"),
    ({"augment": {"crop": 6}}, "image_size is 8, but .* cropped to 6x6"),
    ({"augment": {"pad": 1}}, "pad=1 and crop=0"),
    ({"augment": {"crop": 10, "pad": 1}}, "the crop may be 8 at most"),
])
def test_data_that_is_not_what_the_config_says_is_refused(changes, message):
    data = data_config(**changes)
    dataset = sources.load(data_config())
    with pytest.raises(ValueError, match=message):
        sources.check(dataset, data)


def test_oblong_images_need_a_crop():
    oblong = np.zeros((4, 8, 6, 1), np.uint8)
    dataset = sources.Dataset(oblong, np.zeros(4, np.int32), oblong, np.zeros(4, np.int32))
    data = data_config(train_examples=4, test_examples=4)
    with pytest.raises(ValueError, match="are 8x6 and the network gets squares.*crop=6"):
        sources.check(dataset, data)
    data.augment.crop = data.image_size = 6
    sources.check(dataset, data)


def test_half_resolution_averages_every_two_by_two_pixels(monkeypatch):
    """Of the small scale's CIFAR-10."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    labels = np.arange(3, dtype=np.int32)
    monkeypatch.setattr(sources, "load", lambda data: sources.Dataset(
        images, labels, images[:2], labels[:2]) if data.name == "cifar10" else None)
    halved = smaller.half_resolution(configs.load("small").data)
    assert halved.train_images.shape == (3, 2, 3, 3) and halved.train_images.dtype == np.uint8
    mean = images[1, 2:4, 4:6, 0].mean()
    assert abs(halved.train_images[1, 1, 2, 0] - mean) <= 0.5
    assert len(halved.test_images) == 2 and (halved.train_labels == labels).all()


def test_the_small_digits_are_the_first_of_the_training_set():
    config = configs.load("small", "decay,data=digits")
    dataset = sources.load(config.data)
    sources.check(dataset, config.data)
    assert len(dataset.train_images) == 1280 and len(dataset.test_images) == 360
