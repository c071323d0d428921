"""Reads and decodes the examples of each microbatch in the background, in the order of the run.

The record at a position of the run follows from the position alone (`schedule.order`). So all that
a run reads is known in advance in closed form, across changes of the batch size and evaluations.
Grain reads and decodes blocks of examples, in threads or in worker processes, and returns them in
order; this module cuts them into microbatches. (The size of Grain's own batches cannot change, and
batches made in workers would come in another order.) The size of the blocks and the number of
workers change nothing. One stream serves training and evaluation, so that workers start only once
and the bound below also holds during an evaluation.

The host holds at most two microbatches: the examples decoded ahead, and the microbatch
that is being filled.
"""

import atexit
import dataclasses
import functools
import gc
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from bigbatch.data.examples import Field, Reader
from bigbatch.mistake import Mistake
from bigbatch.schedule import order

# Examples in a block. In a larger one they wait longer for one another; a smaller one costs more
# time per example to transfer.
LARGEST_BLOCK = 16
SHARED_MEMORY = Path("/dev/shm")

_open_streams = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    """Closes all streams before the interpreter shuts down, since Grain cannot do so later."""
    for stream in list(_open_streams):
        stream.close()


@dataclasses.dataclass(frozen=True)
class Split:
    """A split as a run reads it: the training set in the run's order, the test set in its own."""

    reader: Reader
    fields: Mapping[str, Field]  # of its examples
    train: bool  # False: the test set
    seed: int  # of the run

    def read(self, position: int) -> tuple[Mapping[str, np.ndarray], str]:
        """Reads the example at `position`, of the run or (for evaluation) of the test set.

        Returns:
            See `Reader.read`.

        Raises:
            Mistake: what the reader raises, or if what it returns is not as `fields` say.
        """
        record, epoch, epoch_position = position, 0, position
        if self.train:
            found = order.records(self.seed, position, 1, len(self.reader))
            record, epoch, epoch_position = found[0].tolist()
        arrays, reason = self.reader.read(record, epoch, epoch_position)
        for name, field in self.fields.items():
            found = arrays.get(name)
            if not reason and (found is None or (found.shape, found.dtype) != field[:2]):
                is_now = "none" if found is None else f"{found.dtype} {found.shape}"
                raise Mistake(
                    f"record {record} has {is_now} for {name!r}, which is "
                    f"{np.dtype(field.dtype)} {field.shape} by the fields of config.task.")
        return arrays, reason

    def zeros(self, examples: int) -> dict[str, np.ndarray]:
        """Arrays of that many examples."""
        return {name: np.zeros((examples, *field.shape), field.dtype)
                for name, field in self.fields.items()}


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Consecutive updates of one batch size, and the examples that this process reads of them.

    An evaluation is one such update, whose batch is the test set.
    """

    split: Split
    start: int  # position of the first update's first example
    updates: int
    batch_size: int
    # Positions in the batch of the examples of each microbatch, in the order of this process's
    # slots; -1 in padding slots.
    slots_MxS: np.ndarray

    @functools.cached_property
    def needed(self) -> np.ndarray:
        """Positions in the batch of the examples that this process reads, in the order of use."""
        return self.slots_MxS[self.slots_MxS >= 0]


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The data source for Grain: item i is the i-th `block` examples that this process reads."""

    stretches: tuple[Stretch, ...]
    block: int

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """The number of examples that this process has read at the end of each stretch."""
        return np.cumsum([stretch.updates * len(stretch.needed) for stretch in self.stretches])

    def __len__(self) -> int:
        return -(-int(self.ends[-1]) // self.block)

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], list[str]]:
        """Block `index`: arrays by name, and for each example why it is to be skipped, or ""."""
        first = index * self.block
        examples = range(first, min(first + self.block, int(self.ends[-1])))
        arrays, reasons = self.stretches[0].split.zeros(len(examples)), []
        for row, example in enumerate(examples):
            found, reason = self.read(example)
            reasons.append(reason)
            for name in found:
                arrays[name][row] = found[name]
        return arrays, reasons

    def read(self, index: int) -> tuple[Mapping[str, np.ndarray], str]:
        """Reads example `index` of those that this process reads; see `Reader.read`."""
        at = int(np.searchsorted(self.ends, index, side="right"))
        stretch = self.stretches[at]
        before = int(self.ends[at - 1]) if at else 0
        update, slot = divmod(index - before, len(stretch.needed))
        return stretch.split.read(
            stretch.start + update * stretch.batch_size + int(stretch.needed[slot])
        )


class Microbatch(NamedTuple):
    """The part of a microbatch that this process reads, in the order of its slots."""

    train: bool
    start: int  # position of the first example of its update
    arrays_S: dict[str, np.ndarray]  # by name; zeros in a padding slot and for a skipped example
    usable_S: np.ndarray  # bool; False in both cases


class Stream:
    """Iterates over the microbatches of all stretches, and reads ahead in the background.

    Release a microbatch before you ask for the next; otherwise the host holds three.

    Attributes:
        skipped: the number of examples skipped so far, because their reader said so.
        last_skipped: what the last few of them are, and what is wrong with them.
    """

    def __init__(self, stretches: Sequence[Stretch], workers: int, threads: int):
        """Prepares the stream; reading begins when the first microbatch is asked for.

        Args:
            stretches: what to read, in order; all with the same fields.
            workers: the number of processes that decode; with 0, threads of this process decode.
            threads: the number of threads that decode in each process.

        Raises:
            Mistake: if the examples on their way from the workers do not fit into shared memory.
        """
        self.skipped = 0
        self.last_skipped: deque[str] = deque(maxlen=3)
        self._microbatches = (
            (stretch.split, stretch.start + update * stretch.batch_size, slots_S)
            for stretch in stretches
            for update in range(stretch.updates)
            for slots_S in stretch.slots_MxS
        )
        stretches = tuple(stretch for stretch in stretches if len(stretch.needed))
        ahead = min((stretch.slots_MxS.shape[1] for stretch in stretches), default=1)
        self._blocks, running = _background(stretches, workers, threads, ahead)
        self._examples = _one_by_one(self._blocks, running)
        _open_streams.add(self)

    def __iter__(self) -> Iterator[Microbatch]:
        return self

    def __next__(self) -> Microbatch:
        split, start, slots_S = next(self._microbatches)
        arrays, usable = split.zeros(len(slots_S)), slots_S >= 0
        for slot in np.flatnonzero(usable):
            found, reason = next(self._examples)
            for name in arrays:
                arrays[name][slot] = found[name]
            del found  # a part of a block, which is released before the next is taken
            if reason:
                logging.warning("Skipped %s.", reason)
                usable[slot] = False
                self.skipped += 1
                self.last_skipped.append(reason)
        return Microbatch(split.train, start, arrays, usable)

    def close(self) -> None:
        """Stops the threads or processes, and ends the stream."""
        if self._blocks is not None:
            self._blocks.close()
        self._blocks = self._examples = None
        self._microbatches = iter(())
        gc.collect()  # Grain's shared memory is freed with its objects, which form reference cycles
        _wait_for_freeing()


def _one_by_one(
    blocks: Iterator[tuple], workers: int
) -> Iterator[tuple[Mapping[str, np.ndarray], str]]:
    """Yields the examples of the blocks; releases each block before it takes the next.

    Args:
        blocks: see `_background`.
        workers: the processes that make them in turn; 0 for none.

    Raises:
        Mistake: if one of these processes was killed by a signal.
    """
    made = 0
    while True:
        try:
            block = next(blocks)
        except RuntimeError as error:
            killed = re.search(r"exit code -(\d+)", str(error))
            if not workers or not killed:
                raise
            break
        arrays, reasons = block
        for row, reason in enumerate(reasons):
            yield {name: array[row] for name, array in arrays.items()}, reason
        made += 1
        del arrays, reasons
        del block
    del blocks  # nothing may keep Grain's objects from being freed when the stream is closed
    raise Mistake(_why_killed(signal.Signals(int(killed[1])), made % workers, workers))


def _why_killed(by: signal.Signals, worker: int, workers: int) -> str:
    """What a signal that ended a worker says, and what to change."""
    why = {
        signal.SIGKILL: "most likely for memory, which the machine or the container ran out of; "
        "give it more, or",
        signal.SIGBUS: f"most likely because {SHARED_MEMORY} is full; give the container more "
        "(Docker: --shm-size), or",
    }.get(by, "so a library that it calls broke down;")
    return (f"worker {worker} of 0 to {workers - 1}, a process that decodes images, was killed by "
            f"{by.name}, {why} set --config.data.workers to less (0 decodes in threads of the "
            "training process). The same command goes on from the newest checkpoint.")


def _background(
    stretches: tuple[Stretch, ...], workers: int, threads: int, ahead: int
) -> tuple[Iterator[tuple[dict[str, np.ndarray], list[str]]], int]:
    """Grain's iterator over the blocks, which holds at most `ahead` examples, and its workers.

    Fewer workers or threads than asked for are started if all of them would hold more.
    """
    if not stretches:
        return (block for block in ()), 0
    if workers:
        # Blocks of each worker: one in each of its threads, one waiting to be sent, one in the
        # pipe, and in this process one received and one waiting to be. One more is in use.
        each = threads + 4
        running, wanted, key = max(1, min(workers, (ahead - 1) // each)), workers, "workers"
        in_flight, read_ahead = running * each + 1, threads
    else:
        # Two blocks for each thread, and one in use.
        read_ahead = max(1, min(2 * threads, ahead - 1))
        running, wanted, key = min(threads, read_ahead), threads, "read_threads"
        in_flight, threads = read_ahead + 1, running
    if running < wanted:
        logging.warning(
            "Only %d of %d config.data.%s read and decode: all of them would hold more than a "
            "microbatch of %d images.", running, wanted, key, ahead,
        )
    _allow_open_files()
    blocks = Blocks(stretches, max(1, min(LARGEST_BLOCK, ahead // in_flight)))
    dataset = grain.MapDataset.source(blocks).to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=read_ahead)
    )
    if workers:
        bytes_each = sum(array.nbytes for array in stretches[0].split.zeros(1).values())
        _check_shared_memory(in_flight * blocks.block * bytes_each, running)
        if not flags.FLAGS.is_parsed():  # Grain reads absl flags, which only the commands parse
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=running, per_worker_buffer_size=1),
            worker_init_fn=_begin_worker,
        )
    return iter(dataset), running if workers else 0


def _check_shared_memory(wanted: int, workers: int) -> None:
    """Checks that the workers' images fit into shared memory, since overflow kills a process."""
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else wanted
    if free < wanted:
        raise Mistake(
            f"{workers} of config.data.workers pass up to {wanted / 1e6:.0f} MB of images through "
            f"{SHARED_MEMORY}, which has {free / 1e6:.0f} MB free: give the container more "
            "(Docker: --shm-size), or set --config.data.workers=0 to decode in threads."
        )


def _allow_open_files() -> None:
    """Raises this process's limit of open files as far as the system allows.

    Each shard of a data set stays open. ImageNet has a thousand shards, and the usual limit of a
    process is 1024 files.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _wait_for_freeing() -> None:
    """Waits until this process maps no shared memory, for one second at most.

    Grain frees the memory in a thread. If the process exits earlier, Python reports a leak.
    """
    maps, until = Path("/proc/self/maps"), time.monotonic() + 1.0
    while maps.exists() and "/psm_" in maps.read_text() and time.monotonic() < until:
        time.sleep(0.01)


def _begin_worker(index: int, count: int) -> None:
    """Makes a worker live exactly as long as the training process.

    The signals that tell a run to stop often reach all processes at once, but the training process
    goes on until it has saved a checkpoint and then stops its workers itself. So a worker ignores
    them. If the training process is killed, a thread ends the worker, since Grain's loop would not.
    """
    _allow_open_files()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()
