"""Feeds the compiled programs: the microbatches of each update and the batches of each evaluation.

The examples of a microbatch follow from the position (examples seen), the phase and the layout. A
resident data set is whole on every device, and a microbatch holds record numbers. If the data set
is streamed, a microbatch holds the arrays of its examples too, the fields of the task, and each
process reads only those of its own devices' slots.

A streamed microbatch is on the devices, and its copy on the host is released, when it is yielded.
So at most two microbatches are on the devices if the caller waits for pass k-1 before it asks for
the microbatch of pass k+1, which is then copied while pass k runs.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bigbatch.config import noise_layout
from bigbatch.data import streaming
from bigbatch.data.examples import Field, InMemory, Streamed
from bigbatch.data.resident import lay_out
from bigbatch.job.devices import cut, place, replicated
from bigbatch.mistake import Mistake
from bigbatch.schedule import Phase, order
from bigbatch.schedule.layout import Layout, examples_by_slot, lay_out_examples

Arrays = dict[str, Any]  # of jax.Array; the fields of a resident set are `Rows`
EVALUATIONS = 100_000  # of a start that streams, at most: it keeps what it reads between any two


@dataclasses.dataclass
class Feed:
    """The data of a run, as its programs take it; made by `open_feed`.

    Attributes:
        config: of the run.
        mesh: the devices to feed.
        resident: arrays replicated on the devices: the run's `seed` and, unless the data set is
            streamed, the training set's fields as `Rows`.
        test: the test set's fields as `Rows`, replicated; empty if the data set is streamed.
        stream: the streamed microbatches; None for a resident data set.
        splits: what is streamed, the training set and the test set; None for a resident data set.
    """

    config: ConfigDict
    mesh: Mesh
    resident: Arrays
    test: Arrays
    stream: streaming.Stream | None
    splits: tuple[streaming.Split, streaming.Split] | None = None
    _skipped_before: int = 0  # in streams that were left

    def update(
        self, phase: Phase, layout: Layout, examples_seen: int
    ) -> Iterator[dict[str, jax.Array | np.ndarray]]:
        """Yields the microbatches of the update of `phase` that begins at `examples_seen`.

        A streamed feed yields updates and evaluations only in the order given to `open_feed`. It
        cannot go back: an update that was not taken to its end needs a new feed.

        Yields:
            `examples` as `lay_out_examples` makes them and, if the data set is streamed, the fields
            and `usable` (bool; False for padding and for a skipped example), all cut over the
            devices. In a job of one process, `examples` stays a NumPy array, which the program
            that is called with it transfers sooner.

        Raises:
            Mistake: if a record cannot be read or decoded, or (in a job of one process, which sees
                all of them) if all examples of the update were skipped; the message names records.
        """
        yield from self._microbatches(layout, examples_seen, phase.batch_size)

    def coming(
        self, layout: Layout, examples_seen: int
    ) -> Iterator[dict[str, jax.Array | np.ndarray]]:
        """Yields microbatches of the ghost batches that come next, for a measurement.

        As `update` does; updates take the same examples afterwards.
        """
        yield from self._microbatches(layout, examples_seen, layout.ghosts * self.config.ghost_size)

    def _microbatches(
        self, layout: Layout, examples_seen: int, count: int
    ) -> Iterator[dict[str, jax.Array | np.ndarray]]:
        """The microbatches of `count` examples from `examples_seen` on."""
        before = self.skipped
        records_Bx3 = order.records(
            self.config.seed, examples_seen, count, self.config.data.train_examples)
        for examples in lay_out_examples(records_Bx3, layout, self.config.ghost_size):
            fed = {"examples": examples}
            if jax.process_count() > 1:
                fed = place(fed, cut(self.mesh))
            # No name may hold the arrays here, while the caller asks for the next.
            yield fed | self._put_next_of(count, examples_seen, before) if self.stream else fed

    def evaluation(self) -> Iterator[Arrays]:
        """Yields the batches of the whole test set, in order.

        Yields:
            `record` (int32; -1 for padding and for a skipped example) and, if the data set is
            streamed, the fields, all cut over the devices.

        Raises:
            Mistake: if a record cannot be read or decoded; the message names the record.
        """
        for record_DxS in _test_records(self.config, self.mesh.size):
            if self.stream:
                yield self._put_next(False, 0, record_DxS[_own_devices(self.mesh)].reshape(-1))
            else:
                yield place({"record": record_DxS.reshape(-1)}, cut(self.mesh))

    @property
    def skipped(self) -> int:
        """How many examples this process has skipped so far, those of the test set in each
        evaluation anew; see `streaming.Stream`."""
        return self._skipped_before + self.stream.skipped if self.stream else 0

    def none_of_use(self, what: str) -> Mistake:
        """The mistake that nothing of `what` counts: all was skipped, or weighs nothing."""
        if not self.stream:
            return Mistake(
                f"no example of {what} is of use: all weights in {self.config.task}'s losses are "
                "0, so there is no mean.")
        last = "; ".join(self.stream.last_skipped)
        return Mistake(
            f"no example of {what} is of use: all were skipped, as config.data.on_bad_image is "
            f"'skip', or weigh nothing{last and f'. The last that were skipped: {last}'}. Repair "
            "them, or take another split."
        )

    def follow(
        self, phases: Sequence[Phase], layouts: Sequence[Layout], examples_seen: int,
        evaluated_at: Iterable[int], measured_at: Iterable[int] = (),
    ) -> None:
        """Feeds other phases from now on; see `open_feed`. What was read ahead is read again."""
        if not self.stream:
            return
        self._skipped_before += self.stream.skipped
        self.stream.close()
        self.stream = _open_stream(self.config, *self.splits, self.mesh, phases, layouts,
                                   examples_seen, evaluated_at, measured_at)

    def close(self) -> None:
        """Stops the threads or processes that read examples."""
        if self.stream:
            self.stream.close()

    def _put_next_of(self, count: int, examples_seen: int, skipped_before: int) -> Arrays:
        """As `_put_next`, of an update of `count`; raises Mistake if all of them were skipped."""
        arrays = self._put_next(True, examples_seen)
        if self.skipped - skipped_before == count:
            raise self.none_of_use(f"the update from example {examples_seen}")
        return arrays

    def _put_next(self, train: bool, start: int, record_S: np.ndarray | None = None) -> Arrays:
        """Puts this process's part of the stream's next microbatch, with `record`, on its devices.

        Returns after the transfer, so that the host's copy is released before the next is made.
        """
        taken = next(self.stream, None)
        if taken is None or taken[:2] != (train, start):
            raise RuntimeError(
                f"the stream is at {taken[:2] if taken else 'its end'} and was asked for "
                f"{(train, start)}, as (train, position): updates and evaluations must be taken in "
                "the order given to open_feed."
            )
        own = dict(taken.arrays_S)
        if record_S is None:
            own["usable"] = taken.usable_S
        else:
            own["record"] = np.where(taken.usable_S, record_S, -1)
        devices = [self.mesh.devices.flat[at] for at in _own_devices(self.mesh)]

        def one(array: np.ndarray) -> jax.Array:
            shape = (len(array) // len(devices) * self.mesh.size, *array.shape[1:])
            parts = jax.device_put(np.split(array, len(devices)), devices)
            return jax.make_array_from_single_device_arrays(shape, cut(self.mesh), parts)

        return jax.block_until_ready(jax.tree.map(one, own))


def open_feed(
    config: ConfigDict, fields: Mapping[str, Field], data: InMemory | Streamed, mesh: Mesh,
    phases: Sequence[Phase], layouts: Sequence[Layout], examples_seen: int,
    evaluated_at: Iterable[int], measured_at: Iterable[int] = (),
) -> Feed:
    """Puts a data set on the devices, or opens it for streaming from `examples_seen` on.

    Args:
        config: of the run.
        fields: what an example consists of.
        data: as the task has loaded it, in agreement with `config` and `fields`.
        mesh: the devices to feed.
        phases: the phases still to run, in order; the first may be under way.
        layouts: the layouts of these phases.
        examples_seen: the position at which the run starts or continues.
        evaluated_at: the positions at which the test set is evaluated, ascending; they include
            `examples_seen` if an evaluation precedes the next update. Read for streaming only.
        measured_at: the positions after `examples_seen` at which the noise scale is measured with
            `config.noise_layout`, before the evaluation there. Read for streaming only.

    Raises:
        Mistake: if a data set is streamed through too many evaluations, or more is on its way
            between processes than there is room for.
    """
    seed = {"seed": np.uint32(config.seed)}
    if isinstance(data, Streamed):
        splits = tuple(streaming.Split(reader, fields, is_train, config.seed)
                       for reader, is_train in ((data.train, True), (data.test, False)))
        stream = _open_stream(config, *splits, mesh, phases, layouts, examples_seen, evaluated_at,
                              measured_at)
        return Feed(config, mesh, place(seed, replicated(mesh)), {}, stream, splits)
    resident, test = place(
        (seed | {name: lay_out(data.train[name]) for name in fields},
         {name: lay_out(data.test[name]) for name in fields}),
        replicated(mesh),
    )
    return Feed(config, mesh, resident, test, None)


def _known(
    config: ConfigDict, phases: Sequence[Phase], positions: Iterable[int], key: str
) -> list[int]:
    """The positions as a list; raises Mistake if they are too many."""
    known = list(itertools.islice(positions, EVALUATIONS + 1))
    if len(known) > EVALUATIONS:
        group, _, name = key.rpartition(".")
        raise Mistake(
            f"config.{key} is {(config[group] if group else config)[name]}, and until epoch "
            f"{phases[-1].end_example / config.data.train_examples:g} that is more than "
            f"{EVALUATIONS} of them, all of which a streamed run must know when it starts: set "
            f"{key} to more, or recipe.epochs to less."
        )
    return known


def update_shapes(
    config: ConfigDict, fields: Mapping[str, Field], mesh: Mesh, slots_each: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `Feed.update` yields, for the compiler.

    Args:
        config: of the run.
        fields: see `open_feed`.
        mesh: the devices to feed.
        slots_each: slots of a device in one pass.
    """
    rows = mesh.size * slots_each * config.ghost_size
    usable = {"usable": _shape((rows,), np.bool_, mesh)} if config.data.streaming else {}
    return (_shapes(config, fields, mesh, rows) | usable
            | {"examples": _shape((rows, 4), np.int32, mesh)})


def evaluation_shapes(
    config: ConfigDict, fields: Mapping[str, Field], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `Feed.evaluation` yields, for the compiler."""
    rows = _test_records(config, mesh.size)[0].size
    return _shapes(config, fields, mesh, rows) | {"record": _shape((rows,), np.int32, mesh)}


def resident_shapes(
    config: ConfigDict, fields: Mapping[str, Field], mesh: Mesh
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shapes of `Feed.resident` and `Feed.test`, as far as the config alone determines them.

    Of fields that may be larger than they say (`Field.or_larger`) these sizes are assumed.
    """
    seed = {"seed": jax.ShapeDtypeStruct((), np.uint32, sharding=replicated(mesh))}
    if config.data.streaming:
        return seed, {}

    def split(examples: int) -> dict[str, Any]:
        laid_out = {
            name: jax.eval_shape(
                lay_out, jax.ShapeDtypeStruct((examples, *field.shape), field.dtype))
            for name, field in fields.items()}
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
            laid_out)

    return seed | split(config.data.train_examples), split(config.data.test_examples)


def _shapes(
    config: ConfigDict, fields: Mapping[str, Field], mesh: Mesh, rows: int
) -> dict[str, jax.ShapeDtypeStruct]:
    if not config.data.streaming:
        return {}
    return {name: _shape((rows, *field.shape), field.dtype, mesh)
            for name, field in fields.items()}


def _shape(shape: tuple[int, ...], dtype: type, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=cut(mesh))


def _own_devices(mesh: Mesh) -> list[int]:
    """The indices of this process's devices in the mesh, which need not be consecutive."""
    return [
        at for at, device in enumerate(mesh.devices.flat)
        if device.process_index == jax.process_index()
    ]


def _test_records(config: ConfigDict, devices: int) -> np.ndarray:
    """The record numbers of the test set in order, int32 (batches, devices, examples).

    A device takes `eval_batch_size` examples, or its share of the test set if that is less. The
    last batch is padded with -1.
    """
    examples = config.data.test_examples
    each = min(config.eval_batch_size, -(-examples // devices))
    batches = -(-examples // (each * devices))
    records = np.arange(batches * devices * each, dtype=np.int32)
    return np.where(records < examples, records, -1).reshape(batches, devices, each)


def _open_stream(
    config: ConfigDict, train: streaming.Split, test: streaming.Split, mesh: Mesh,
    phases: Sequence[Phase], layouts: Sequence[Layout], examples_seen: int,
    evaluated_at: Iterable[int], measured_at: Iterable[int],
) -> streaming.Stream:
    """Opens the stream of all that this process reads: updates, with what is between them."""
    own = _own_devices(mesh)
    records_MxDxS = _test_records(config, mesh.size)[:, own]
    evaluation = streaming.Stretch(
        test, 0, 1, config.data.test_examples, records_MxDxS.reshape(len(records_MxDxS), -1)
    )
    due, to_measure = (set(_known(config, phases, *pair)) for pair in (
        (evaluated_at, "eval_every_epochs"), (measured_at, "noise.every_epochs")))
    stretches = [evaluation] if examples_seen in due else []

    def slots(layout: Layout) -> np.ndarray:
        positions, after = examples_by_slot(layout, config.ghost_size)
        slots_MxDxS = np.where(after >= 0, positions, -1)[:, own]
        return slots_MxDxS.reshape(layout.microbatches, -1)

    def measured(position: int) -> streaming.Stretch:
        layout = noise_layout(config, mesh.size)
        return streaming.Stretch(
            train, position, 1, layout.ghosts * config.ghost_size, slots(layout))

    for phase, layout in zip(phases, layouts, strict=True):
        slots_MxS = slots(layout)
        start = max(phase.start_example, examples_seen)
        between = [position for position in sorted(due | to_measure)
                   if start < position < phase.end_example]
        for end in [*between, phase.end_example]:
            updates = (end - start) // phase.batch_size
            stretches.append(
                streaming.Stretch(train, start, updates, phase.batch_size, slots_MxS)
            )
            if end in to_measure:
                stretches.append(measured(end))
            if end in due:
                stretches.append(evaluation)
            start = end
    return streaming.Stream(stretches, config.data.workers, config.data.read_threads)
