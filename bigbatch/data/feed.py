"""What the compiled programs are fed: the microbatches of each update and of each evaluation.

One place turns a position of the run (the examples seen), its phase and the devices into arrays on
the devices. A resident data set lies there whole, and a microbatch is the numbers of its records.
Streamed images come with it: each process reads those of its own devices' slots and no others.

A microbatch is on the devices, its copy on the host given up, when it is handed out. A caller that
waits for the pass before the last one before it asks for the next therefore has two on the devices
at most: one at work, one that was copied meanwhile.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from bigbatch.data import sources, streaming
from bigbatch.job.devices import cut, place, replicated
from bigbatch.schedule import Phase, order
from bigbatch.schedule.layout import Layout, examples_by_slot, lay_out_examples

Arrays = dict[str, jax.Array]


@dataclasses.dataclass
class Feed:
    """Feeds a run; see `open_feed`.

    Attributes:
        resident: what lies whole on each device: the run's `seed`, and the training set's `images`
            and `labels` unless each microbatch brings its own.
        test: the same of the test set.
    """

    config: ConfigDict
    mesh: Mesh
    resident: Arrays
    test: Arrays
    stream: streaming.Stream | None

    def update(
        self, phase: Phase, layout: Layout, examples_seen: int
    ) -> Iterator[dict[str, jax.Array | np.ndarray]]:
        """The microbatches of the update of `phase` that begins at `examples_seen`.

        Streamed updates and evaluations are to be taken in the order `open_feed` was told. One
        that is left halfway ends the run: the next start opens a feed at its first example.

        Yields:
            `examples` as `lay_out_examples` makes them, and where it is streamed `images` and
            `labels`, all cut over the devices. A single process leaves `examples` to the program
            that is called with them, which is the sooner way there.

        Raises:
            Mistake: naming a record that cannot be read or decoded.
        """
        records_Bx3 = order.records(
            self.config.seed, examples_seen, phase.batch_size, self.config.data.train_examples
        )
        for examples in lay_out_examples(records_Bx3, layout, self.config.ghost_size):
            fed = {"examples": examples}
            if jax.process_count() > 1:
                fed = place(fed, cut(self.mesh))
            yield fed | self._place_next(True, examples_seen) if self.stream else fed

    def evaluation(self) -> Iterator[Arrays]:
        """The batches of the whole test set, in order.

        Yields:
            `record` (int32; -1 for a padding slot, and for an image that was skipped), and where
            it is streamed `images` and `labels`, all cut over the devices.

        Raises:
            Mistake: naming a record that cannot be read or decoded.
        """
        for record_DxS in _test_records(self.config, self.mesh.size):
            if self.stream:
                yield self._place_next(False, 0, record_DxS[_own_devices(self.mesh)].reshape(-1))
            else:
                yield place({"record": record_DxS.reshape(-1)}, cut(self.mesh))

    @property
    def skipped(self) -> int:
        """How many images were of no use and were skipped by this process, in all."""
        return self.stream.skipped if self.stream else 0

    def close(self) -> None:
        """Ends the threads or processes that read."""
        if self.stream:
            self.stream.close()

    def _place_next(self, train: bool, start: int, record_S: np.ndarray | None = None) -> Arrays:
        """The stream's next microbatch, each process's part on its devices; with `record` if given.

        Returns when all of it is there, so that the host's copy goes before the next one is made.
        """
        taken = next(self.stream, None)
        if taken is None or taken[:2] != (train, start):
            raise RuntimeError(
                f"the stream is at {taken[:2] if taken else 'its end'} and was asked for "
                f"{(train, start)}, as (train, position): updates and evaluations must be taken as "
                "open_feed was told."
            )
        own = {"images": taken.images_SxHxWxC, "labels": taken.labels_S}
        if record_S is not None:
            own["record"] = np.where(taken.labels_S == streaming.NO_LABEL, -1, record_S)
        devices = [self.mesh.devices.flat[at] for at in _own_devices(self.mesh)]

        def one(array: np.ndarray) -> jax.Array:
            shape = (len(array) // len(devices) * self.mesh.size, *array.shape[1:])
            parts = jax.device_put(np.split(array, len(devices)), devices)
            return jax.make_array_from_single_device_arrays(shape, cut(self.mesh), parts)

        return jax.block_until_ready(jax.tree.map(one, own))


def open_feed(
    config: ConfigDict, mesh: Mesh, phases: Sequence[Phase], layouts: Sequence[Layout],
    examples_seen: int, evaluated_at: Sequence[int],
) -> Feed:
    """Loads the data set, or begins to stream it, from `examples_seen` on.

    Args:
        config: of the run. `data.streaming` says which, and then the keys are read that
            `streaming.make_reader` names, `data.workers` and `data.read_threads`.
        mesh: the devices to feed.
        phases: still to run, in order; the first one may be under way.
        layouts: of these phases.
        examples_seen: where the run stands.
        evaluated_at: the examples seen when the test set is evaluated, rising; `examples_seen`
            itself where that comes before the next update. Only read for streaming.

    Raises:
        Mistake: if the data is not what the config says; nothing has been decoded but a
            resident data set.
    """
    seed = {"seed": np.uint32(config.seed)}
    if config.data.streaming:
        stream = _open_stream(config, mesh, phases, layouts, examples_seen, evaluated_at)
        return Feed(config, mesh, place(seed, replicated(mesh)), {}, stream)
    dataset = sources.load(config.data)
    sources.check(dataset, config.data)
    resident, test = place(
        (seed | {"images": dataset.train_images, "labels": dataset.train_labels},
         {"images": dataset.test_images, "labels": dataset.test_labels}),
        replicated(mesh),
    )
    return Feed(config, mesh, resident, test, None)


def update_shapes(
    config: ConfigDict, mesh: Mesh, slots_each: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `Feed.update` yields, to compile for.

    Args:
        config: of the run.
        mesh: the devices that are fed.
        slots_each: ghost batches a device takes in one pass.
    """
    rows = mesh.size * slots_each * config.ghost_size
    return _shapes(config, mesh, rows) | {"examples": _shape((rows, 4), np.int32, mesh)}


def evaluation_shapes(config: ConfigDict, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of what `Feed.evaluation` yields, to compile for."""
    rows = _test_records(config, mesh.size)[0].size
    return _shapes(config, mesh, rows) | {"record": _shape((rows,), np.int32, mesh)}


def resident_shapes(
    config: ConfigDict, mesh: Mesh
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax.ShapeDtypeStruct]]:
    """The shapes of `Feed.resident` and `Feed.test`, as far as a config without its data tells.

    Images that are cropped are taken to have the size that is cut out.
    """
    seed = {"seed": jax.ShapeDtypeStruct((), np.uint32, sharding=replicated(mesh))}
    if config.data.streaming:
        return seed, {}
    size, channels = config.data.image_size, len(config.data.mean)

    def split(examples: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(mesh))
            for name, shape, dtype in (
                ("images", (examples, size, size, channels), np.uint8),
                ("labels", (examples,), np.int32),
            )
        }

    return seed | split(config.data.train_examples), split(config.data.test_examples)


def _shapes(config: ConfigDict, mesh: Mesh, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    if not config.data.streaming:
        return {}
    size = config.data.image_size
    return {"images": _shape((rows, size, size, 3), np.uint8, mesh),
            "labels": _shape((rows,), np.int32, mesh)}


def _shape(shape: tuple[int, ...], dtype: type, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=cut(mesh))


def _own_devices(mesh: Mesh) -> list[int]:
    """The places in the mesh of this process's devices; not in one run on every machine."""
    return [
        at for at, device in enumerate(mesh.devices.flat)
        if device.process_index == jax.process_index()
    ]


def _test_records(config: ConfigDict, devices: int) -> np.ndarray:
    """The test set's records in order, int32 (batch, device, slot); -1 fills the last batch up.

    `eval_batch_size` slots on each device, or no more than its share of the test set.
    """
    examples = config.data.test_examples
    each = min(config.eval_batch_size, -(-examples // devices))
    batches = -(-examples // (each * devices))
    records = np.arange(batches * devices * each, dtype=np.int32)
    return np.where(records < examples, records, -1).reshape(batches, devices, each)


def _open_stream(
    config: ConfigDict, mesh: Mesh, phases: Sequence[Phase], layouts: Sequence[Layout],
    examples_seen: int, evaluated_at: Sequence[int],
) -> streaming.Stream:
    """All that this process reads in the run: updates, cut where the test set comes between."""
    train_records, test_records = sources.open_records(config.data)
    train = streaming.make_reader(train_records, config.data, True, config.seed)
    test = streaming.make_reader(test_records, config.data, False, config.seed)
    own = _own_devices(mesh)
    records_MxDxS = _test_records(config, mesh.size)[:, own]
    evaluation = streaming.Stretch(
        test, 0, 1, config.data.test_examples, records_MxDxS.reshape(len(records_MxDxS), -1)
    )
    due = set(evaluated_at)
    stretches = [evaluation] if examples_seen in due else []
    for phase, layout in zip(phases, layouts, strict=True):
        places, after = examples_by_slot(layout, config.ghost_size)
        slots_MxDxS = np.where(after >= 0, places, -1)[:, own]
        slots_MxS = slots_MxDxS.reshape(layout.microbatches, -1)
        start = max(phase.start_example, examples_seen)
        between = [position for position in evaluated_at if start < position < phase.end_example]
        for end in [*between, phase.end_example]:
            updates = (end - start) // phase.batch_size
            stretches.append(
                streaming.Stretch(train, start, updates, phase.batch_size, slots_MxS)
            )
            if end in due:
                stretches.append(evaluation)
            start = end
    return streaming.Stream(stretches, config.data.workers, config.data.read_threads)
