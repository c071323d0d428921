"""A config's update alone, compiled, on tensors that stay where they are."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bigbatch.config import make_recipe
from bigbatch.data import augment
from bigbatch.data.resident import lay_out
from bigbatch.job.devices import compiler_options, cut, make_mesh, place, replicated
from bigbatch.programs.compilation import programs_of
from bigbatch.programs.dispatch import as_rates, room_for_sums, take_update
from bigbatch.programs.lowering import lower_update
from bigbatch.schedule import order, rates_at
from bigbatch.schedule.layout import lay_out_examples, make_layout
from bigbatch.tasks import contract
from bigbatch.update import network, update
from experiments.figures import load_config

NOISE = "data.streaming=false,data.name=experiments.speed.bare.noise"  # settings of a config


def noise(data: ConfigDict) -> tuple[np.ndarray, ...]:
    """Images and labels without meaning: no benchmark needs a data set."""
    generator, arrays = np.random.default_rng(0), []
    for examples in (data.train_examples, data.test_examples):
        shape = (examples, data.image_size, data.image_size, len(data.mean))
        arrays += [generator.integers(0, 256, shape, np.uint8),
                   generator.integers(0, data.num_classes, examples)]
    return tuple(arrays)


def on_gpu() -> bool:
    """Whether updates are computed on a GPU. Then they are in bfloat16 and of full size."""
    return jax.default_backend() == "gpu"


def wide_resnet(short: bool, *settings: str) -> ConfigDict:
    """configs/cifar10.py with noise for images: WRN-16-4, or a WRN-10-1 in the short form."""
    dtype = "bfloat16" if on_gpu() else "float32"
    small = ["model.depth=10", "model.width=1", "data.image_size=8", "data.augment.crop=8"]
    return load_config(",".join(
        [f"configs/cifar10.py:decay,{NOISE},dtype={dtype}", *(small * short), *settings]))


def narrow() -> list[str]:
    """The setting of `wide_resnet` with which a CPU needs no more than minutes."""
    return [] if on_gpu() else ["model.width=1"]


def describe(config: ConfigDict) -> str:
    """The network's name in the table."""
    return f"WRN-{config.model.depth}-{config.model.width}"


def given(
    config: ConfigDict, fields: Mapping, keys: jax.Array, train: bool
) -> tuple[jax.Array, jax.Array]:
    """Images as they lie on the device; replaces the task's `prepare`."""
    return fields["images"], fields["labels"]


class BareUpdate:
    """The update of a run, always on the run's first batch.

    Attributes:
        functions: those of the run's update.
        lowered: the update's programs, not compiled.
        programs: the update's programs, compiled.
        loss: of the last update taken, None before the first.
    """

    def __init__(
        self, config: ConfigDict, net: network.Network | None = None, augmented: bool = True,
        devices: int = 1,
    ):
        """Args:
        config: of a run; `recipe.batch_size`, `microbatches` and `sharding` are read.
        net: replaces the network that the config names.
        augmented: whether the training set lies on the device as a run has it, and each update
            takes its examples from there and prepares them. Otherwise images lie there as the
            network gets them, without augmentation.
        devices: how many of the first devices make the update.
        """
        self.mesh = mesh = make_mesh(jax.devices()[:devices], config.sharding.shards)
        net = net or network.build(config)
        self.functions = update.make_update(config, net, mesh, None if augmented else given)
        state = update.init_state(config, net)
        self.state = place(jax.tree.map(np.asarray, state), jax.tree.map(
            lambda leaf: leaf.sharding, update.abstract_state(config, net, mesh)))
        train = contract.load(config, contract.task_of(config)).train
        records_Bx3 = order.records(
            config.seed, 0, config.recipe.batch_size, config.data.train_examples)
        layout = make_layout(
            len(records_Bx3), config.ghost_size, mesh.size, config.max_per_device_batch,
            config.microbatches)
        resident: dict[str, Any] = {"seed": np.uint32(config.seed)}
        if augmented:
            resident |= {name: lay_out(arrays) for name, arrays in train.items()}
        self.resident = place(resident, replicated(mesh))
        self.batches = []
        for examples in lay_out_examples(records_Bx3, layout, config.ghost_size):
            batch = {"examples": examples}
            if not augmented:
                record = examples[:, 0]
                batch |= {"images": augment.normalise(
                              train["images"][record], config.data.mean, config.data.std,
                              config.dtype),
                          "labels": train["labels"][record]}
            self.batches.append(place(batch, cut(mesh)))
        dtype = jax.tree.leaves(self.state.params)[0].dtype
        recipe = make_recipe(config)
        self.rates = as_rates(
            mesh, dtype, rates_at(recipe, recipe.batch_size, 0)._replace(learning_rate=0.01))
        self.sums = room_for_sums(config, net, mesh) if len(self.batches) > 1 else None
        self.loss: float | None = None
        self.lowered = [
            lower_update(
                self.functions, program.kind, mesh, self.state, self.resident, self.batches[0])
            for program in programs_of(layout)]
        self.programs = [program.compile() for program in self.lowered]

    def take(self, updates: int = 1) -> None:
        """Takes so many updates, and waits for the last."""
        measured = None
        for _ in range(updates):
            self.state, self.sums, measured, _ = take_update(
                self.programs, self.state, self.sums, self.resident, iter(self.batches),
                self.rates)
        jax.block_until_ready(self.state)
        self.loss = float(measured.loss)

    def compile_with(self, wrap: Callable[[Callable], Callable], *arguments: Any) -> Callable:
        """The compiled program of `wrap(update)` for `arguments`, of which the first is a state.

        The program donates this state.
        """
        # Not the jitted function, which has compiler options: only the outermost program may.
        function = wrap(self.functions.update.__wrapped__)
        return jax.jit(
            function, donate_argnums=0, compiler_options=compiler_options(self.mesh),
        ).lower(*arguments).compile()
