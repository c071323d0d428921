"""The images of each microbatch, read and decoded in the background, in the run's own order.

Which records an update takes follows from the examples seen and from nothing else (`order`), so
the whole stream of a run, over every change of batch size, is known ahead as a closed form. Grain
reads and decodes blocks of it, in threads or in worker processes, and hands them over in order;
they are cut into microbatches here. (Grain's own batches could not change their size, and batches
made in workers would come in another order.) How it is cut into blocks or dealt to workers changes
no image.

The host holds two microbatches of images at most: those decoded ahead, and the one being filled.
"""

import atexit
import dataclasses
import functools
import gc
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from bigbatch.data import decode, order

STYLES = ("goyal", "inception", "none")
# More in a block would make them wait for one another, fewer cost more to hand over.
LARGEST_BLOCK = 16
NO_LABEL = -1
SHARED_MEMORY = Path("/dev/shm")

_open_streams = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    """Before the interpreter takes itself apart, when Grain can no longer do it."""
    for stream in list(_open_streams):
        stream.close()


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Updates of one batch size, and which of their examples this process feeds."""

    start: int  # examples seen before the first update
    updates: int
    batch_size: int
    # The example's place in the batch, for each seat of each microbatch; -1 for an empty seat.
    seats_MxS: np.ndarray

    @functools.cached_property
    def needed(self) -> np.ndarray:
        """The places in the batch that this process reads, in the order of their use."""
        return self.seats_MxS[self.seats_MxS >= 0]


@dataclasses.dataclass(frozen=True)
class Reader:
    """Makes one example: an image, cropped to size, and its label."""

    records: Sequence[Mapping[str, Any]]  # `image` (encoded) and `label`, as `sources.tfds_records`
    split: str  # for messages
    train: bool  # False: in the order of the records, cropped for evaluation
    seed: int
    examples: int  # N
    size: int
    style: str
    eval_resize: float
    resample: str
    skip: bool

    def read(self, position: int) -> tuple[np.ndarray, int, str]:
        """The example at `position` of the run: uint8 (size, size, 3), its label, "".

        Where it cannot be decoded and is to be skipped: zeros, NO_LABEL and the reason.

        Raises:
            ValueError: naming a record that cannot be decoded.
        """
        record, epoch, place = position, 0, position
        if self.train:
            record, epoch, place = order.records(self.seed, position, 1, self.examples)[0].tolist()
        try:
            example = self.records[record]
        except RuntimeError as error:  # ArrayRecord's, for absent or broken files
            raise ValueError(
                f"record {record} of split {self.split!r} cannot be read: {error}"
            ) from error
        encoded = example["image"]
        try:
            box = self._box(*decode.dimensions(encoded), epoch, place)
            return decode.decode(encoded, box, self.size, self.resample), int(example["label"]), ""
        except ValueError as error:
            reason = f"record {record}{_name(example)} of split {self.split!r}: {error}"
            if self.skip:
                return np.zeros((self.size, self.size, 3), np.uint8), NO_LABEL, reason
            raise ValueError(
                f"{reason}. Repair it, or set --config.data.on_bad_image=skip to train without it."
            ) from None

    def _box(self, width: int, height: int, epoch: int, place: int) -> tuple[int, int, int, int]:
        if not self.train or self.style == "none":
            style = self.style
            return decode.eval_box(width, height, self.size, self.eval_resize, style)
        crop = {"goyal": decode.random_resized_crop_box, "inception": decode.inception_crop_box}
        return crop[self.style](width, height, decode.uniforms(self.seed, epoch, place))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What Grain reads: the stream, `block` examples at a time."""

    reader: Reader
    stretches: tuple[Stretch, ...]
    block: int

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """How many examples this process has read by the end of each stretch."""
        return np.cumsum([stretch.updates * len(stretch.needed) for stretch in self.stretches])

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // self.block)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Images uint8 (block, size, size, 3), labels int32 (block,), why some were skipped."""
        first = index * self.block
        count = min(self.block, int(self.ends[-1]) - first)
        images = np.empty((count, self.reader.size, self.reader.size, 3), np.uint8)
        labels = np.empty(count, np.int32)
        skipped = []
        for place in range(count):
            position = self.position(first + place)
            images[place], labels[place], reason = self.reader.read(position)
            if reason:
                skipped.append(reason)
        return images, labels, skipped

    def position(self, index: int) -> int:
        """Where in the run example `index` of this process's stream stands."""
        place = int(np.searchsorted(self.ends, index, side="right"))
        stretch = self.stretches[place]
        before = int(self.ends[place - 1]) if place else 0
        update, seat = divmod(index - before, len(stretch.needed))
        return stretch.start + update * stretch.batch_size + int(stretch.needed[seat])


class Stream:
    """Iterates over the microbatches of all updates: images and labels of this process's seats.

    Each is uint8 (seats, size, size, 3) and int32 (seats,). An empty seat has a black image and the
    label -1, and so has an image that was skipped. Drop a microbatch before asking for the next, or
    the host holds three.

    Attributes:
        waited_seconds: how long the caller has waited for images, in all.
        skipped: images that could not be decoded and were skipped, in all.
    """

    def __init__(self, reader: Reader, stretches: Sequence[Stretch], workers: int, threads: int):
        """Args:
        reader: makes an example.
        stretches: what to read, in order.
        workers: processes that decode; 0 for threads in this one.
        threads: that decode in each process.
        """
        self.waited_seconds = 0.0
        self.skipped = 0
        self._size = reader.size
        self._seats = (
            seats_S
            for stretch in stretches
            for _ in range(stretch.updates)
            for seats_S in stretch.seats_MxS
        )
        self._block: tuple[np.ndarray, np.ndarray] | None = None  # read, in part used
        self._used = 0
        stretches = tuple(stretch for stretch in stretches if len(stretch.needed))
        ahead = min((stretch.seats_MxS.shape[1] for stretch in stretches), default=1)
        self._blocks = _background(reader, stretches, workers, threads, ahead)
        _open_streams.add(self)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        began = time.perf_counter()
        seats_S = next(self._seats, None)
        if seats_S is None:
            self.close()
            raise StopIteration
        images = np.zeros((len(seats_S), self._size, self._size, 3), np.uint8)
        labels = np.full(len(seats_S), NO_LABEL, np.int32)
        to_fill = np.flatnonzero(seats_S >= 0)
        while len(to_fill):
            if self._block is None:
                *self._block, reasons = next(self._blocks)
                self._used = 0
                self._count_skipped(reasons)
            block_images, block_labels = self._block
            now = to_fill[: len(block_labels) - self._used]
            part = slice(self._used, self._used + len(now))
            images[now], labels[now] = block_images[part], block_labels[part]
            to_fill, self._used = to_fill[len(now) :], part.stop
            if self._used == len(block_labels):
                self._block = block_images = None  # before another one is taken
        self.waited_seconds += time.perf_counter() - began
        return images, labels

    def close(self) -> None:
        """Ends the threads or processes; also done when the stream is no longer used."""
        if self._blocks is None:
            return
        self._blocks.close()
        self._blocks = self._block = None
        self._seats = iter(())
        gc.collect()  # Grain's shared memory is freed with its objects, and they form cycles

    def _count_skipped(self, reasons: list[str]) -> None:
        for reason in reasons:
            logging.warning("Skipped %s.", reason)
        self.skipped += len(reasons)


def open_stream(
    records: Sequence[Mapping[str, Any]],
    data: ConfigDict,
    stretches: Sequence[Stretch],
    seed: int,
    train: bool,
) -> Stream:
    """Begins to read and decode `stretches` in the background.

    Args:
        records: from `sources.tfds_records`.
        data: config.data; read here are `train_examples`, `train_split` and `test_split`,
            `decode_size` (of the images made), `crop_style` ("goyal", "inception" or "none": see
            `decode`), `eval_resize`, `resample` ("bicubic" or "bilinear"), `workers` (processes; 0
            decodes in threads of this one), `read_threads` (in each process) and `on_bad_image`
            ("stop" or "skip").
        stretches: what to read, in order.
        seed: of the run.
        train: with random crops and in the run's order; else in the order of the records.

    Raises:
        ValueError: for a value of `data` that is not allowed.
    """
    for key, allowed in (
        ("crop_style", STYLES), ("resample", tuple(decode.RESAMPLE)),
        ("on_bad_image", ("stop", "skip")),
    ):
        if data[key] not in allowed:
            raise ValueError(
                f"config.data.{key} is {data[key]!r}; allowed are {', '.join(allowed)}."
            )
    for key, least in (
        ("workers", 0), ("read_threads", 1), ("decode_size", 1), ("eval_resize", data.decode_size),
    ):
        if data[key] < least:
            raise ValueError(f"config.data.{key} is {data[key]}; it must be {least} or more.")
    reader = Reader(
        records=records, split=data.train_split if train else data.test_split, train=train,
        seed=seed, examples=data.train_examples, size=data.decode_size, style=data.crop_style,
        eval_resize=data.eval_resize, resample=data.resample, skip=data.on_bad_image == "skip",
    )
    return Stream(reader, stretches, data.workers, data.read_threads)


def _background(
    reader: Reader, stretches: tuple[Stretch, ...], workers: int, threads: int, ahead: int
) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Grain's iterator over the blocks, which holds `ahead` images at most.

    Where `ahead` has no room for all workers or threads there are fewer.
    """
    if workers:
        # In each process one block a thread and one that waits to be sent; then one in the pipe,
        # and in this process one received and one that waits to be. And one being cut up.
        wanted, each = workers, threads + 4
        workers = max(1, min(workers, (ahead - 1) // each))
        in_flight = workers * each + 1
        read_ahead, running = threads, workers
    else:
        # Two blocks a thread and the one being cut up.
        wanted = threads
        read_ahead = max(1, min(2 * threads, ahead - 1))
        threads = running = min(threads, read_ahead)
        in_flight = read_ahead + 1
    if running < wanted:
        logging.warning(
            "%d of %d %s read and decode: a microbatch of %d images has no room for more.", running,
            wanted, "config.data.workers" if workers else "config.data.read_threads", ahead,
        )
    if not stretches:
        return (block for block in ())
    blocks = Blocks(reader, stretches, max(1, min(LARGEST_BLOCK, ahead // in_flight)))
    dataset = grain.MapDataset.source(blocks).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=read_ahead)
    )
    if workers:
        _check_shared_memory(in_flight * blocks.block * 3 * reader.size**2, workers)
        if not flags.FLAGS.is_parsed():  # Grain reads its flags, also where there is no main.py
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1),
            worker_init_fn=_begin_worker,
        )
    return iter(dataset)


def _check_shared_memory(wanted: int, workers: int) -> None:
    """Refuses workers whose images do not fit where Linux passes them: overflowing it kills."""
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else wanted
    if free < wanted:
        raise ValueError(
            f"{workers} of config.data.workers pass up to {wanted / 1e6:.0f} MB of images through "
            f"{SHARED_MEMORY}, which has {free / 1e6:.0f} MB free: give the container more "
            "(Docker: --shm-size), or set --config.data.workers=0 to decode in threads."
        )


def _begin_worker(index: int, count: int) -> None:
    """Lets a worker live exactly as long as the process that trains.

    SIGTERM and Ctrl-C reach a whole job at once, and the process that trains goes on until it has
    saved: it ends its workers itself. Where it is killed, nobody tells them, and Grain's loop would
    wait for ever.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()


def _name(example: Mapping[str, Any]) -> str:
    """What the data set itself calls an example, in brackets, or ""."""
    for key in ("file_name", "id", "tfds_id"):
        if key in example:
            name = example[key]
            return f" ({name.decode(errors='replace') if isinstance(name, bytes) else name})"
    return ""
