"""The images of each microbatch, read and decoded in the background, in the run's own order.

Which record stands at a position of the run follows from the position alone (`order`), so the whole
stream of a run is known ahead as a closed form, over every change of batch size and every
evaluation. Grain reads and decodes blocks of it, in threads or in worker processes, and hands them
over in order; they are cut into microbatches here. (Grain's own batches could not change their
size, and batches made in workers would come in another order.) How it is cut into blocks or dealt
to workers changes no image. One stream serves training and evaluation, so that workers start once
and the bound below holds across an evaluation.

The host holds two microbatches of images at most: those decoded ahead, and the one being filled.
"""

import atexit
import dataclasses
import functools
import gc
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from bigbatch.data import decode
from bigbatch.mistake import Mistake
from bigbatch.schedule import order

CROPS = {"goyal": decode.random_resized_crop_box, "inception": decode.inception_crop_box}
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
class Reader:
    """Makes the examples of a split: each an image, cropped to size, and its label."""

    records: Sequence[Mapping[str, Any]]  # `image` (encoded) and `label`, as `sources.tfds_records`
    split: str  # for messages
    train: bool  # False: in the order of the records, cropped for evaluation
    seed: int
    classes: int
    size: int
    style: str
    eval_share: float
    resample: str
    skip: bool

    def read(self, position: int) -> tuple[np.ndarray, int, str]:
        """The example at `position` of the run: uint8 (size, size, 3), its label, "".

        Where it is of no use and is to be skipped: zeros, NO_LABEL and the reason.

        Raises:
            Mistake: naming a record that cannot be read or decoded.
        """
        record, epoch, place = position, 0, position
        if self.train:
            found = order.records(self.seed, position, 1, len(self.records))
            record, epoch, place = found[0].tolist()
        try:
            example = self.records[record]
        except RuntimeError as error:  # ArrayRecord's, for absent or broken files
            raise Mistake(
                f"record {record} of split {self.split!r} cannot be read: {error}"
            ) from error
        encoded, label = example["image"], int(example["label"])
        try:
            if not 0 <= label < self.classes:
                raise Mistake(f"the label is {label}, outside [0, {self.classes})")
            box = self._box(*decode.dimensions(encoded), epoch, place)
            return decode.decode(encoded, box, self.size, self.resample), label, ""
        except Mistake as error:
            reason = f"record {record}{_name(example)} of split {self.split!r}: {error}"
            if self.skip:
                return np.zeros((self.size, self.size, 3), np.uint8), NO_LABEL, reason
            raise Mistake(
                f"{reason}. Repair it, or set --config.data.on_bad_image=skip to go on without it."
            ) from None

    def _box(self, width: int, height: int, epoch: int, place: int) -> tuple[int, int, int, int]:
        if not self.train or self.style == "none":
            return decode.eval_box(width, height, self.eval_share, self.style)
        return CROPS[self.style](width, height, decode.uniforms(self.seed, epoch, place))


def make_reader(
    records: Sequence[Mapping[str, Any]], data: ConfigDict, train: bool, seed: int
) -> Reader:
    """The reader of one of config.data's splits.

    Args:
        records: of that split, from `sources.open_records`.
        data: config.data. Its `crop_style` is "goyal", "inception" or "none": see `decode`.
        train: with random crops and in the run's order; else in the order of the records.
        seed: of the run.
    """
    return Reader(
        records=records, split=data.train_split if train else data.test_split, train=train,
        seed=seed, classes=data.num_classes, size=data.image_size, style=data.crop_style,
        eval_share=data.eval_share, resample=data.resample, skip=data.on_bad_image == "skip",
    )


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Updates of one batch size, and which of their examples this process feeds."""

    reader: Reader
    start: int  # position of the first update's first example
    updates: int
    batch_size: int
    # The example's place in the batch, for each slot of each microbatch; -1 for a padding slot.
    slots_MxS: np.ndarray

    @functools.cached_property
    def needed(self) -> np.ndarray:
        """The places in the batch that this process reads, in the order of their use."""
        return self.slots_MxS[self.slots_MxS >= 0]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What Grain reads: the stream, `block` examples at a time."""

    stretches: tuple[Stretch, ...]
    block: int

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """How many examples this process has read by the end of each stretch."""
        return np.cumsum([stretch.updates * len(stretch.needed) for stretch in self.stretches])

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // self.block)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Images uint8 (block, size, size, 3), labels int32 (block,), reasons of `Reader.read`."""
        first = index * self.block
        examples = range(first, min(first + self.block, int(self.ends[-1])))
        size = self.stretches[0].reader.size
        images = np.empty((len(examples), size, size, 3), np.uint8)
        labels, reasons = np.empty(len(examples), np.int32), []
        for place, example in enumerate(examples):
            images[place], labels[place], reason = self.read(example)
            reasons.append(reason)
        return images, labels, reasons

    def read(self, index: int) -> tuple[np.ndarray, int, str]:
        """Example `index` of this process's stream, as `Reader.read`."""
        at = int(np.searchsorted(self.ends, index, side="right"))
        stretch = self.stretches[at]
        before = int(self.ends[at - 1]) if at else 0
        update, slot = divmod(index - before, len(stretch.needed))
        return stretch.reader.read(
            stretch.start + update * stretch.batch_size + int(stretch.needed[slot])
        )


class Microbatch(NamedTuple):
    """What this process feeds of a microbatch, in the order of its slots."""

    train: bool
    start: int  # position of its update's first example
    images_SxHxWxC: np.ndarray  # uint8; black in a padding slot and for a skipped image
    labels_S: np.ndarray  # int32; NO_LABEL there


class Stream:
    """Iterates over the microbatches of all stretches; each is read while others are used.

    Drop a microbatch before asking for the next, or the host holds three.

    Attributes:
        skipped: images that were of no use and were skipped, in all.
    """

    def __init__(self, stretches: Sequence[Stretch], workers: int, threads: int):
        """Begins when the first microbatch is asked for.

        Args:
            stretches: what to read, in order; of one size of image.
            workers: processes that decode; 0 for threads in this one.
            threads: that decode in each process.

        Raises:
            Mistake: if what the workers pass on does not fit into shared memory.
        """
        self.skipped = 0
        self._microbatches = (
            (stretch.reader, stretch.start + update * stretch.batch_size, slots_S)
            for stretch in stretches
            for update in range(stretch.updates)
            for slots_S in stretch.slots_MxS
        )
        stretches = tuple(stretch for stretch in stretches if len(stretch.needed))
        ahead = min((stretch.slots_MxS.shape[1] for stretch in stretches), default=1)
        self._blocks = _background(stretches, workers, threads, ahead)
        self._examples = _one_by_one(self._blocks)
        _open_streams.add(self)

    def __iter__(self) -> Iterator[Microbatch]:
        return self

    def __next__(self) -> Microbatch:
        reader, start, slots_S = next(self._microbatches)
        images = np.zeros((len(slots_S), reader.size, reader.size, 3), np.uint8)
        labels = np.full(len(slots_S), NO_LABEL, np.int32)
        for slot in np.flatnonzero(slots_S >= 0):
            images[slot], labels[slot], reason = next(self._examples)
            if reason:
                logging.warning("Skipped %s.", reason)
                self.skipped += 1
        return Microbatch(reader.train, start, images, labels)

    def close(self) -> None:
        """Ends the threads or processes; the stream is over then."""
        if self._blocks is not None:
            self._blocks.close()
        self._blocks = self._examples = None
        self._microbatches = iter(())
        gc.collect()  # Grain's shared memory is freed with its objects, and they form cycles
        _wait_for_freeing()


def _one_by_one(blocks: Iterator[tuple]) -> Iterator[tuple[np.ndarray, int, str]]:
    """The examples of the blocks; each block is let go before the next is taken."""
    while True:
        yield from zip(*next(blocks), strict=True)


def _background(
    stretches: tuple[Stretch, ...], workers: int, threads: int, ahead: int
) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Grain's iterator over the blocks, which holds `ahead` images at most.

    Where `ahead` has no room for all workers or threads there are fewer.
    """
    if not stretches:
        return (block for block in ())
    if workers:
        # In each process one block a thread and one that waits to be sent; then one in the pipe,
        # and in this process one received and one that waits to be. And one being cut up.
        each = threads + 4
        running, wanted, key = max(1, min(workers, (ahead - 1) // each)), workers, "workers"
        in_flight, read_ahead = running * each + 1, threads
    else:
        # Two blocks a thread and the one being cut up.
        read_ahead = max(1, min(2 * threads, ahead - 1))
        running, wanted, key = min(threads, read_ahead), threads, "read_threads"
        in_flight, threads = read_ahead + 1, running
    if running < wanted:
        logging.warning(
            "%d of %d config.data.%s read and decode: a microbatch of %d images has no room for "
            "more.", running, wanted, key, ahead,
        )
    _allow_open_files()
    blocks = Blocks(stretches, max(1, min(LARGEST_BLOCK, ahead // in_flight)))
    dataset = grain.MapDataset.source(blocks).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=read_ahead)
    )
    if workers:
        _check_shared_memory(in_flight * blocks.block * 3 * stretches[0].reader.size**2, running)
        if not flags.FLAGS.is_parsed():  # Grain reads its flags, also where there is no main.py
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=running, per_worker_buffer_size=1),
            worker_init_fn=_begin_worker,
        )
    return iter(dataset)


def _check_shared_memory(wanted: int, workers: int) -> None:
    """Refuses workers whose images do not fit where Linux passes them: overflowing it kills."""
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else wanted
    if free < wanted:
        raise Mistake(
            f"{workers} of config.data.workers pass up to {wanted / 1e6:.0f} MB of images through "
            f"{SHARED_MEMORY}, which has {free / 1e6:.0f} MB free: give the container more "
            "(Docker: --shm-size), or set --config.data.workers=0 to decode in threads."
        )


def _allow_open_files() -> None:
    """As many as the system lets: each shard of a data set stays open, and ImageNet has a thousand,
    where the usual limit of a process is 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _wait_for_freeing() -> None:
    """Until this process maps no shared memory any more, or a second has passed.

    Grain frees it in a thread, and where a process leaves at once Python would report it as leaked.
    """
    maps, until = Path("/proc/self/maps"), time.monotonic() + 1.0
    while maps.exists() and "/psm_" in maps.read_text() and time.monotonic() < until:
        time.sleep(0.01)


def _begin_worker(index: int, count: int) -> None:
    """Lets a worker live exactly as long as the process that trains.

    SIGTERM and Ctrl-C reach a whole job at once, and the process that trains goes on until it has
    saved: it ends its workers itself. Where it is killed, nobody tells them, and Grain's loop would
    wait for ever.
    """
    _allow_open_files()
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
