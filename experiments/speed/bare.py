"""A config's update alone, compiled, on tensors that stay where they are."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bigbatch.data import augment, sources
from bigbatch.job.devices import cut, make_mesh, place, replicated
from bigbatch.schedule import layout, order
from bigbatch.update import network, update

NOISE = "data.streaming=false,data.name=experiments.speed.bare.noise"  # settings of a config


def noise(data: ConfigDict) -> tuple[np.ndarray, ...]:
    """Images and labels without meaning: no benchmark needs a data set."""
    generator, arrays = np.random.default_rng(0), []
    for examples in (data.train_examples, data.test_examples):
        shape = (examples, data.image_size, data.image_size, len(data.mean))
        arrays += [generator.integers(0, 256, shape, np.uint8),
                   generator.integers(0, data.num_classes, examples)]
    return tuple(arrays)


def given(
    config: ConfigDict, resident: Mapping, batch: Mapping
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """In the place of `update.prepare_microbatch`: images that are ready for the network."""
    images, labels = batch["images"], batch["labels"]
    return images, labels, jax.random.split(jax.random.key(0), len(labels))


class BareUpdate:
    """An update on the first device, over and over, on the batch that a run would begin with.

    Attributes:
        programs: what it calls, compiled.
        loss: of the last update taken, None before the first.
    """

    def __init__(
        self, config: ConfigDict, net: network.Network | None = None, augmented: bool = True
    ):
        """Args:
        config: of a run; `recipe.batch_size` and `microbatches` are read.
        net: in the place of the network that the config names.
        augmented: whether images lie on the device as uint8 and each update augments them; else
            they lie there as the network gets them, not augmented.
        """
        mesh = make_mesh(jax.devices()[:1])
        self.net = net or network.build(config)
        functions = update.make_update(config, self.net, mesh, None if augmented else given)
        state = update.init_state(config, self.net)
        self.state = place(jax.tree.map(np.asarray, state), replicated(mesh))
        dataset = sources.load(config.data)
        records_Bx3 = order.records(
            config.seed, 0, config.recipe.batch_size, config.data.train_examples)
        seating = layout.make_seating(
            len(records_Bx3), config.ghost_size, 1, config.max_per_device_batch,
            config.microbatches)
        resident: dict[str, Any] = {"seed": np.uint32(config.seed)}
        if augmented:
            resident |= {"images": dataset.train_images, "labels": dataset.train_labels}
        self.resident = place(resident, replicated(mesh))
        self.batches = []
        for examples in layout.seat_examples(records_Bx3, seating, config.ghost_size):
            batch = {"examples": examples}
            if not augmented:
                record = examples[:, 0]
                batch |= {"images": augment.normalise(
                              dataset.train_images[record], config.data.mean, config.data.std,
                              config.dtype),
                          "labels": dataset.train_labels[record]}
            self.batches.append(place(batch, cut(mesh)))
        number = jax.tree.leaves(self.state.params)[0].dtype.type
        self.hyper = place(
            (number(0.01), number(config.recipe.momentum)), replicated(mesh))
        self.loss: float | None = None
        self.lowered, self.sums = self._lower(functions, mesh)
        self.programs = [program.compile() for program in self.lowered]

    def _lower(self, functions: update.Update, mesh: jax.sharding.Mesh) -> tuple[list, Any]:
        if len(self.batches) == 1:
            return [functions.update.lower(
                self.state, self.resident, self.batches[0], *self.hyper)], None
        sums = jax.tree.map(
            lambda leaf: place(np.zeros(leaf.shape, leaf.dtype), cut(mesh)),
            update.abstract_sums(self.state, mesh))
        return [
            functions.accumulate.lower(
                self.state, sums, self.resident, self.batches[0], np.bool_(True)),
            functions.apply.lower(self.state, sums, *self.hyper),
        ], sums

    def take(self, updates: int = 1) -> None:
        """So many updates, and waits for the last."""
        measured = None
        for _ in range(updates):
            if len(self.batches) == 1:
                self.state, measured = self.programs[0](
                    self.state, self.resident, self.batches[0], *self.hyper)
                continue
            accumulate, apply = self.programs
            for place_in_update, batch in enumerate(self.batches):
                self.sums, _ = accumulate(
                    self.state, self.sums, self.resident, batch, np.bool_(place_in_update == 0))
            self.state, measured = apply(self.state, self.sums, *self.hyper)
        jax.block_until_ready(self.state)
        self.loss = float(measured.loss)

    def takes(self, updates: int) -> Callable[[], None]:
        """`take` as something to measure."""
        return lambda: self.take(updates)
