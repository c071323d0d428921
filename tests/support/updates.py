"""Updates made by the functions a run makes them with, without its logs and checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from bigbatch import schedule
from bigbatch.config import make_layouts, make_phases, make_recipe
from bigbatch.data import sources
from bigbatch.data.resident import lay_out
from bigbatch.job.devices import cut, make_mesh, place, replicated
from bigbatch.programs.dispatch import take_update
from bigbatch.schedule import order
from bigbatch.schedule.layout import Layout, lay_out_examples, make_layout
from bigbatch.schedule.rates import Rates
from bigbatch.tasks import contract
from bigbatch.update import network, update
from tests.support.configs import tiny

NO_AUGMENTATION = ("data.augment.pad=0", "data.augment.crop=0")


def with_model(network: str, model: Mapping[str, Any], *settings: str) -> ConfigDict:
    """The tiny config with a model of the tests' own, by its path under `tests`."""
    config = tiny(f"network=tests.{network}", *settings)
    with config.unlocked():
        config.model = ConfigDict(model)
    return config


def conv_net(*settings: str, **model: Any) -> ConfigDict:
    """The tiny config with `foreign_models.ConvNet`, which compiles faster than a Wide ResNet."""
    return with_model("support.foreign_models.ConvNet", {"ghost_size": 16, **model}, *settings)


class Updater(NamedTuple):
    """Everything an update needs, for a config and a number of devices."""

    config: ConfigDict
    net: network.Network
    functions: update.Update
    mesh: jax.sharding.Mesh
    state: update.State  # before the first update

    def rates(self, learning_rate: float, momentum: float, **others: float) -> Rates:
        """Rates of the parameters' type, the config's own where they are not given."""
        recipe = make_recipe(self.config)
        own = schedule.rates_at(recipe, recipe.batch_size, 0)._replace(
            learning_rate=learning_rate, momentum=momentum,
            **{"look_ahead": momentum} | others)
        return jax.tree.map(self.number, own)

    @property
    def number(self) -> Callable:
        """Makes a number of the parameters' type."""
        return jax.tree.leaves(self.state.params)[0].dtype.type

    def batches(self, records_Bx3: np.ndarray, layout: Layout) -> list[Mapping]:
        """What each microbatch feeds."""
        return [
            place({"examples": examples}, cut(self.mesh))
            for examples in lay_out_examples(records_Bx3, layout, self.config.ghost_size)
        ]

    def take(
        self, state: update.State, resident: Mapping, batches: Sequence[Mapping],
        learning_rate: float, momentum: float, **others: float,
    ) -> tuple[update.State, update.Metrics]:
        """One update, over as many passes as there are batches. The state is donated.

        `others` are rates too; see `rates`.
        """
        rates = self.rates(learning_rate, momentum, **others)
        functions, sums = self.functions, None
        calls = [functions.update]
        if len(batches) > 1:
            calls = [functions.accumulate, functions.apply]
            # Left over from another update, so of no meaning.
            sums = jax.tree.map(
                lambda leaf: place(np.full(leaf.shape, np.nan, leaf.dtype), cut(self.mesh)),
                functions.sums)
        state, _, measured, _ = take_update(calls, state, sums, resident, iter(batches), rates)
        return state, measured


def prepare(config: ConfigDict, devices: int = 1) -> Updater:
    """An updater on the first `devices` devices; for a float64 config, 64-bit arrays are on."""
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    mesh = make_mesh(jax.devices()[:devices], config.sharding.shards)
    net = network.build(config)
    state = place(jax.tree.map(np.asarray, update.init_state(config, net)), jax.tree.map(
        lambda leaf: leaf.sharding, update.abstract_state(config, net, mesh)))
    return Updater(config, net, update.make_update(config, net, mesh), mesh, state)


def training_set(updater: Updater) -> dict[str, Any]:
    """The fields of the config's training set and its seed, on the updater's devices."""
    data = contract.load(updater.config, contract.task_of(updater.config))
    fields = {name: lay_out(arrays) for name, arrays in data.train.items()}
    return place({**fields, "seed": np.uint32(updater.config.seed)}, replicated(updater.mesh))


def train(
    config: ConfigDict, devices: int = 1, updates: int = 20,
    begin_with: Sequence[update.State] = (),
) -> tuple[list[update.State], list[update.Metrics]]:
    """A run's first updates: the state and the metrics after each, as NumPy arrays.

    `begin_with` has the states after the updates that were made before; these are not made again.
    """
    updater = prepare(config, devices)
    resident, state, states, measured = training_set(updater), updater.state, [], []
    if begin_with:
        state = place(begin_with[-1], jax.tree.map(lambda leaf: leaf.sharding, state))
    phases = make_phases(config)
    layouts = make_layouts(config, phases, devices)
    examples_seen = 0
    for number in range(updates):
        phase = schedule.phase_at(phases, examples_seen)
        records_Bx3 = order.records(
            config.seed, examples_seen, phase.batch_size, config.data.train_examples)
        if number < len(begin_with):
            examples_seen += phase.batch_size
            continue
        state, metrics = updater.take(
            state, resident, updater.batches(records_Bx3, layouts[phase.index]),
            **schedule.take_rates(make_recipe(config), phases, phase, examples_seen,
                                  examples_seen + phase.batch_size)._asdict(),
        )
        states.append(jax.device_get(state))
        measured.append(jax.device_get(metrics))
        examples_seen += phase.batch_size
    return states, measured


def inputs(
    updater: Updater, batch_size: int, start: int = 0
) -> tuple[np.ndarray, list[Mapping]]:
    """The records (examples, 3) of a run's update from `start`, and what its passes feed."""
    config = updater.config
    records_Bx3 = order.records(config.seed, start, batch_size, config.data.train_examples)
    layout = make_layout(batch_size, config.ghost_size, updater.mesh.size,
                                 config.max_per_device_batch, config.microbatches)
    return records_Bx3, updater.batches(records_Bx3, layout)


def pictures(updater: Updater, records_Bx3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the network sees of the records where nothing is augmented, and one-hot labels."""
    data = updater.config.data
    dataset = sources.load(data)
    images = dataset.train_images[records_Bx3[:, 0]].astype(np.float64)
    labels = dataset.train_labels[records_Bx3[:, 0]]
    return (images - data.mean) / data.std, np.eye(data.num_classes)[labels]


def distance(tree: Any, reference: Any) -> float:
    """||tree - reference|| / ||reference||, over all numbers of two equal trees; 0 without any."""
    assert jax.tree.structure(tree) == jax.tree.structure(reference)
    if not jax.tree.leaves(reference):
        return 0.0
    pairs = [
        (np.asarray(one, np.float64), np.asarray(other, np.float64))
        for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    ]
    assert all(one.shape == other.shape for one, other in pairs)
    difference = sum(np.sum((one - other) ** 2) for one, other in pairs)
    return float(np.sqrt(difference / sum(np.sum(other**2) for _, other in pairs)))
