"""Streaming input: the run's own order, whatever reads it and however it is cut up."""

import io
import logging
import time
import tracemalloc
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from bigbatch.data import decode, photographs, sources, streaming
from bigbatch.data.examples import Field
from bigbatch.schedule import order
from tests.support.sample_data import data_dir

EXAMPLES = 50
SEED = 3


def make_data(**settings) -> ConfigDict:
    return ConfigDict({
        "name": "imagenet2012", "dir": "", "train_split": "train", "test_split": "validation",
        "num_classes": 1000, "image_size": 24, "crop_style": "goyal", "eval_share": 0.75,
        "resample": "bicubic", "workers": 0, "read_threads": 1, "on_bad_image": "stop",
    } | settings)


def dealt(start: int, updates: int, batch: int, microbatches: int = 1) -> tuple:
    """What a stretch has beside its reader: all examples of each batch, in order."""
    return start, updates, batch, np.arange(batch).reshape(microbatches, -1)


def make_split(records, data: ConfigDict, train: bool = True) -> streaming.Split:
    """A split as classification has it streamed."""
    side = data.image_size
    fields = {"images": Field((side, side, 3), np.uint8), "labels": Field((), np.int32)}
    return streaming.Split(
        photographs.make_reader(records, data, train, SEED), fields, train, SEED)


def labels_of(microbatch) -> np.ndarray:
    """The labels, -1 in padding and for a skipped image."""
    return np.where(microbatch.usable_S, microbatch.arrays_S["labels"], -1)


def open_stream(records, data: ConfigDict, *stretches: tuple, train: bool = True):
    split = make_split(records, data, train)
    return streaming.Stream(
        [streaming.Stretch(split, *stretch) for stretch in stretches], data.workers,
        data.read_threads)


def encoded_picture(record: int) -> bytes:
    """One colour, so that any crop shows it."""
    buffer = io.BytesIO()
    colour = (5 * record % 256, 40, 200)
    Image.new("RGB", (40 + record % 7, 40), colour).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


class Records:
    """A small data set whose labels are the records' numbers; notes each read in a file."""

    def __init__(self, note: Path | None = None, broken: dict[int, bytes] | None = None):
        self.note, self.broken = note, broken or {}

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, record):
        if self.note is not None:
            with self.note.open("ab", buffering=0) as file:
                file.write(b".")
        image = self.broken.get(record) or encoded_picture(record)
        return {"image": image, "label": record, "file_name": f"{record}.JPEG".encode()}


def collect(stream) -> tuple[np.ndarray, np.ndarray]:
    """All images and all labels."""
    taken = list(stream)
    stream.close()
    return (np.concatenate([microbatch.arrays_S["images"] for microbatch in taken]),
            np.concatenate(list(map(labels_of, taken))))


def expected_labels(start: int, count: int) -> list[int]:
    return order.records(SEED, start, count, EXAMPLES)[:, 0].tolist()


@cache
def photographs_of_sample():
    """The first of the sample's training photographs, as TFDS reads them."""
    data = make_data(dir=data_dir("imagenet2012"))
    return sources.tfds_records(sources.open_tfds(data), data.name, f"train[:{EXAMPLES}]")


# Which examples come, and in which order.


def test_a_batch_size_change_in_mid_epoch_loses_and_repeats_nothing():
    # 3 x 7 + 2 x 20 + 39 = 100 examples: two epochs of 50, both cut by a change.
    stretches = [dealt(0, 3, 7), dealt(21, 2, 20, 4), dealt(61, 1, 39, 3)]
    stream = open_stream(Records(), make_data(), *stretches)
    sizes, starts, labels = [], [], []
    for train, start, arrays, usable in stream:
        assert train and usable.all()
        images, some = arrays["images"], arrays["labels"]
        sizes.append(len(some))
        starts.append(start)
        labels += some.tolist()
        colours = images.reshape(len(images), -1, 3).mean(1)
        np.testing.assert_allclose(colours[:, 0], 5 * some % 256, atol=4)
    stream.close()
    assert sizes == [7] * 3 + [5] * 8 + [13] * 3
    assert starts == [0, 7, 14] + [21] * 4 + [41] * 4 + [61] * 3
    assert labels == expected_labels(0, 100)
    assert sorted(labels[:50]) == sorted(labels[50:]) == list(range(50))


def test_a_stream_opened_in_the_middle_goes_on_as_if_it_had_never_stopped():
    images, labels = collect(open_stream(Records(), make_data(), dealt(0, 10, 9)))
    images_later, labels_later = collect(open_stream(Records(), make_data(), dealt(27, 7, 9)))
    np.testing.assert_array_equal(labels[27:], labels_later)
    np.testing.assert_array_equal(images[27:], images_later)


def test_each_process_reads_the_slots_of_its_own_devices_and_no_others(tmp_path):
    slots_MxS = np.array([[0, 1, 4, 5], [8, 9, -1, -1], [-1, -1, -1, -1]])
    note = tmp_path / "reads"
    microbatches = list(open_stream(Records(note), make_data(), (30, 2, 10, slots_MxS)))
    at = expected_labels(30, 20)
    expected = [
        [at[10 * update + slot] if slot >= 0 else -1 for slot in slots_S]
        for update in range(2) for slots_S in slots_MxS
    ]
    assert [labels_of(microbatch).tolist() for microbatch in microbatches] == expected
    for microbatch in microbatches:
        images, labels = microbatch.arrays_S["images"], labels_of(microbatch)
        assert not images[labels < 0].any() and images[labels >= 0].any(axis=(1, 2, 3)).all()
    assert note.stat().st_size == 2 * 6


def test_evaluation_goes_through_the_records_in_order_with_the_centre_crop():
    slots_MxS = np.r_[:50, [-1] * 10].reshape(3, 20)
    images, labels = collect(
        open_stream(Records(), make_data(), (0, 1, 50, slots_MxS), train=False))
    assert labels.tolist() == [*range(50), *[-1] * 10]
    encoded = Records()[7]["image"]
    box = decode.eval_box(*decode.dimensions(encoded), 0.75, "goyal")
    np.testing.assert_array_equal(images[7], decode.decode(encoded, box, 24, "bicubic"))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluations_come_between_updates_and_change_no_update(workers):
    data = make_data(workers=workers)
    train, test = (make_split(photographs_of_sample(), data, kind) for kind in (True, False))
    evaluation = streaming.Stretch(test, *dealt(0, 1, EXAMPLES, 2))
    stream = streaming.Stream(
        [evaluation, streaming.Stretch(train, *dealt(0, 2, 20)), evaluation,
         streaming.Stretch(train, *dealt(40, 3, 20)), evaluation], workers, 1)
    taken = list(stream)
    stream.close()
    assert [microbatch[:2] for microbatch in taken] == [
        (False, 0), (False, 0), (True, 0), (True, 20), (False, 0), (False, 0), (True, 40),
        (True, 60), (True, 80), (False, 0), (False, 0)]
    images = np.concatenate(
        [microbatch.arrays_S["images"] for microbatch in taken if microbatch.train])
    np.testing.assert_array_equal(images, reference()[0])
    tests = [microbatch.arrays_S["images"] for microbatch in taken if not microbatch.train]
    np.testing.assert_array_equal(tests[0], tests[2])
    np.testing.assert_array_equal(tests[1], tests[5])


def test_a_stream_of_nothing_ends_at_once():
    assert not list(open_stream(Records(), make_data()))


# The same crop, whatever reads it.


@cache
def reference() -> tuple[np.ndarray, np.ndarray]:
    """Two epochs of 50 photographs, read one after the other without a stream."""
    images, labels = [], []
    for record, epoch, place in order.records(SEED, 0, 100, EXAMPLES).tolist():
        example = photographs_of_sample()[record]
        size = decode.dimensions(example["image"])
        box = decode.random_resized_crop_box(*size, decode.uniforms(SEED, epoch, place))
        images.append(decode.decode(example["image"], box, 24, "bicubic"))
        labels.append(example["label"])
    return np.stack(images), np.array(labels)


@pytest.mark.parametrize("workers, threads, stretches", [
    (0, 1, [dealt(0, 1, 100)]),
    (0, 4, [dealt(0, 10, 10)]),
    (0, 4, [dealt(0, 1, 30, 3), dealt(30, 1, 70, 2)]),
    (2, 2, [dealt(0, 1, 40, 2), dealt(40, 2, 30, 1)]),
])
def test_a_record_gets_the_same_crop_however_the_run_is_cut_and_whoever_reads(
    workers, threads, stretches
):
    data = make_data(workers=workers, read_threads=threads)
    images, labels = collect(open_stream(photographs_of_sample(), data, *stretches))
    np.testing.assert_array_equal(labels, reference()[1])
    np.testing.assert_array_equal(images, reference()[0])


def test_one_of_two_hosts_gets_the_same_crops():
    slots_MxS = np.arange(20).reshape(2, 2, 5)[:, 1]  # the second half of each microbatch
    images, _ = collect(open_stream(photographs_of_sample(), make_data(), (0, 5, 20, slots_MxS)))
    np.testing.assert_array_equal(images, reference()[0].reshape(10, 2, 5, 24, 24, 3)[:, 1]
                                  .reshape(images.shape))


def test_crop_style_and_epoch_change_the_crop():
    def first_two_epochs(style):
        data = make_data(crop_style=style)
        images, _ = collect(open_stream(photographs_of_sample(), data, dealt(0, 1, 100)))
        records = order.records(SEED, 0, 100, EXAMPLES)[:, 0]
        return images[:50][np.argsort(records[:50])], images[50:][np.argsort(records[50:])]

    goyal, inception, none = map(first_two_epochs, ("goyal", "inception", "none"))
    np.testing.assert_array_equal(none[0], none[1])
    for first, second in (goyal, inception, (goyal[0], inception[0])):
        same = [np.array_equal(a, b) for a, b in zip(first, second, strict=True)]
        assert sum(same) < 5


# Images that are of no use.


BROKEN = {3: encoded_picture(3)[:300], 7: b"<html>not found</html>", 11: b"\xff\xd8\xff\xd9" * 9}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_stops_the_run_with_its_records_name(workers):
    stream = open_stream(
        Records(broken={3: BROKEN[3]}), make_data(workers=workers), dealt(0, 10, 5))
    with pytest.raises(ValueError, match=r"record 3 \(3.JPEG\) of split 'train': .*truncated.*"
                                         r"config.data.on_bad_image=skip"):
        list(stream)
    stream.close()


def test_a_broken_image_may_be_skipped_and_counted(caplog):
    stream = open_stream(
        Records(broken=BROKEN), make_data(on_bad_image="skip"), dealt(0, 10, 10))
    with caplog.at_level(logging.WARNING):
        images, labels = collect(stream)
    assert stream.skipped == 6
    assert labels.tolist() == [-1 if n in BROKEN else n for n in expected_labels(0, 100)]
    assert not images[labels < 0].any()
    assert "record 7 (7.JPEG) of split 'train': not a JPEG" in caplog.text


def test_a_label_that_is_no_class_is_refused():
    data = make_data(num_classes=EXAMPLES - 1)
    with pytest.raises(ValueError, match=r"record 49 .*: the label is 49, outside \[0, 49\)"):
        list(open_stream(Records(), data, dealt(0, 5, 10)))


def test_a_record_that_cannot_be_read_is_named():
    class Lost(Records):
        def __getitem__(self, record):
            raise RuntimeError("Failed to open file: gone.array_record")  # as ArrayRecord does

    with pytest.raises(ValueError, match=r"record 0 of split 'validation' cannot be read: .*gone"):
        list(open_stream(Lost(), make_data(), dealt(0, 1, 5), train=False))


# What the host holds, and how long the caller waits.


@pytest.mark.parametrize("workers, threads", [(0, 1), (0, 4), (2, 3)])
def test_the_host_holds_two_microbatches_of_images_at_most(tmp_path, workers, threads):
    note = tmp_path / "reads"
    data = make_data(workers=workers, read_threads=threads)
    stream = open_stream(Records(note), data, dealt(0, 100, 40, 2))
    for taken in range(1, 9):
        next(stream)
        time.sleep(0.15)  # all that is read ahead is read by now
        # Those waiting, and those a microbatch is filled with: never more than two of 20.
        assert note.stat().st_size - 20 * taken <= 20, "more than a microbatch is read ahead"
    stream.close()
    assert not list(stream)


def test_images_are_given_up_when_they_are_handed_on():
    """The peak of NumPy's allocations: one microbatch filled, up to one read ahead, no third."""
    data = make_data(image_size=200, eval_share=1.0, read_threads=2)
    stream = open_stream(Records(), data, dealt(0, 10, 40))
    size = next(stream).arrays_S["images"].nbytes
    tracemalloc.start()
    for taken in stream:
        time.sleep(0.05)
        del taken
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    stream.close()
    assert size < peak < 2.3 * size, f"{peak / size:.2f} microbatches are held"


def test_workers_that_do_not_fit_a_microbatch_are_not_started(caplog):
    data = make_data(workers=2)
    with caplog.at_level(logging.WARNING):
        stream = open_stream(Records(), data, dealt(0, 3, 6))
    assert "1 of 2 config.data.workers" in caplog.text
    assert collect(stream)[1].tolist() == expected_labels(0, 18)


def test_workers_without_room_in_shared_memory_are_refused(monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(streaming, "SHARED_MEMORY", Path("/"))
    with pytest.raises(ValueError, match="--shm-size"):
        open_stream(Records(), make_data(workers=2), dealt(0, 1, 30))
