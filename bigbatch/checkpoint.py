"""What a run leaves, for use outside of it.

    from bigbatch import checkpoint
    model = checkpoint.load_model("WORKDIR")
    logits = model(images)                       # uint8, as they are in the data set
    averaged = checkpoint.load_model("WORKDIR", average=True)  # of a run with config.ema
    state = checkpoint.load("WORKDIR")           # only the arrays

Of a run of another task, a model is called with a dict of its fields in the place of images.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bigbatch.config import saved_config
from bigbatch.data import decode
from bigbatch.mistake import Mistake
from bigbatch.storage.checkpoint import NETWORKS, load, load_run
from bigbatch.tasks import classification, contract
from bigbatch.update import network
from bigbatch.update.evaluation import outputs_of

__all__ = ["Model", "load", "load_model"]


class Model:
    """A trained network as evaluation uses it, from examples as they are in the data set to logits.

    Attributes:
        config: of the run.
        params: its parameters, as nested dicts of NumPy arrays.
        batch_stats: its running statistics, likewise.
    """

    def __init__(self, config: ConfigDict, params: Any, batch_stats: Any):
        """Args:
        config: of the run.
        params: its parameters.
        batch_stats: its running statistics.
        """
        self.config, self.params, self.batch_stats = config, params, batch_stats
        self._net, self._task = network.build(config), contract.task_of(config)
        self._fields = contract.fields_of(config, self._task)
        self._program = jax.jit(self.logits)
        self._on_device: Any = None

    @property
    def takes_images(self) -> bool:
        """Whether an array of images is enough to call it, as for classification."""
        return "images" in self._fields

    def logits(self, params: Any, batch_stats: Any, given: jax.Array | Mapping) -> Any:
        """The logits as a function for JAX to transform: nothing is checked or cut into batches.

        Args:
            params: the parameters.
            batch_stats: the running statistics.
            given: images, or a dict of fields, see `__call__`.
        """
        given = given if isinstance(given, Mapping) else {"images": given}
        examples = jax.tree.leaves(given)[0].shape[0]
        absent = {name: jnp.zeros((examples, *field.shape), field.dtype)
                  for name, field in self._fields.items() if name not in given}
        outputs, _ = outputs_of(
            self.config, self._task, self._net, params, batch_stats, {**absent, **given},
            jnp.arange(examples))
        wide = jnp.promote_types(self.config.dtype, jnp.float32)
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        return jax.tree.map(lambda leaf: leaf.astype(wide), first)

    def __call__(self, given: np.ndarray | Mapping[str, np.ndarray]) -> Any:
        """The logits (N, classes) of any number of images, or what another task's network returns.

        At most `config.eval_batch_size` examples are on the device at once. Smaller numbers are
        filled up to a power of two, so that few programs are compiled.

        Args:
            given: images, uint8 (N, height, width, channels) as they are in the data set: cropping
                and normalisation are done here. Of files of photographs `decode` makes them. Or a
                dict of the fields of the run's task, examples on the first axis. A field that is
                left out, such as the label, is 0.

        Returns:
            In float32 (float64 where `config.dtype` is) what the network returns, examples on the
            first axis; of a tuple its first entry, without auxiliary logits.

        Raises:
            Mistake: if they are of another type or shape.
        """
        fields = self._checked(given)
        if self._on_device is None:
            self._on_device = jax.device_put((self.params, self.batch_stats))
        examples = len(next(iter(fields.values())))
        most = self.config.eval_batch_size
        size = min(most, 1 << max(0, examples - 1).bit_length())
        batches = []
        for start in range(0, max(examples, 1), size):
            batch = {name: array[start : start + size] for name, array in fields.items()}
            filled = {name: np.pad(array, [(0, size - len(array)), *[(0, 0)] * (array.ndim - 1)])
                      for name, array in batch.items()}
            count = min(size, examples - start)
            batches.append(jax.tree.map(
                lambda leaf, count=count: np.asarray(leaf)[:count],
                self._program(*self._on_device, filled)))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *batches)

    def _checked(self, given: Any) -> dict[str, np.ndarray]:
        """The fields as arrays; raises Mistake if they are none of this task's."""
        if not isinstance(given, Mapping):
            if not self.takes_images:
                raise Mistake(
                    f"a model of {self._task.name} is called with a dict of its fields, "
                    f"{', '.join(self._fields)}: model({{'{next(iter(self._fields))}': array}})."
                )
            given = {"images": given}
        fields = {name: np.asarray(array) for name, array in given.items()}
        for name, array in fields.items():
            if name == "images" and self._task.fields is classification.fields:
                self.check(array.shape, array.dtype)
                continue
            field = self._fields.get(name)
            if field is None:
                raise Mistake(f"{name!r} is no field of {self._task.name}; these are "
                              f"{', '.join(self._fields)}.")
            shape = array.shape[1:]
            fits = shape == field.shape or (field.or_larger and len(shape) == len(field.shape))
            if not array.ndim or not fits or array.dtype != field.dtype:
                raise Mistake(
                    f"{name!r} is {array.dtype} {array.shape}; it must be {np.dtype(field.dtype)} "
                    f"(N, {', '.join(map(str, field.shape))}).")
        if len(set(map(len, fields.values()))) != 1:
            raise Mistake("the fields must be of the same number of examples, and of some.")
        return fields

    def decode(self, encoded: bytes) -> np.ndarray:
        """The pixels of a JPEG or PNG file as the run's evaluation of photographs cuts them out.

        Raises:
            Mistake: if the bytes are no such file.
        """
        data = self.config.data
        width, height = decode.dimensions(encoded)
        box = decode.eval_box(width, height, data.eval_share, data.crop_style)
        return decode.decode(encoded, box, data.image_size, data.resample)

    def check(self, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Checks the shape and type of images.

        Raises:
            Mistake: if the network does not take such images.
        """
        data = self.config.data
        crop, side = data.augment.crop, data.image_size
        wanted = f"(N, {side}, {side}, {len(data.mean)})"
        if crop:
            wanted = f"(N, height, width, {len(data.mean)}) with sides of {crop} or more"
        if dtype != np.uint8:
            raise Mistake(
                f"the images are {dtype}; they must be uint8, from 0 to 255 as in the data set: "
                "the model normalises them itself."
            )
        sides = shape[1:3]
        fit = all(one >= crop for one in sides) if crop else sides == (side, side)
        if len(shape) != 4 or shape[3] != len(data.mean) or not fit:
            one = ", also for one image: images[None]" if len(shape) == 3 else ""
            raise Mistake(f"the images are of shape {shape}; they must be {wanted}{one}.")


def load_model(
    workdir: str | Path, examples_seen: int | None = None, average: bool = False
) -> Model:
    """The network of a run's checkpoint, ready to be called on images or other examples.

    Args:
        workdir: a folder, or gs://bucket/path. A model of one's own, which the config names by its
            path, must be importable. A run in float64 switches JAX's 64-bit arrays on.
        examples_seen: the checkpoint's position; None for the newest whole one.
        average: whether to take the average of the weights that the run keeps (`config.ema`), in
            the place of its last weights.

    Raises:
        Mistake: if there is no such checkpoint (the message has the positions) or it is not whole,
            or it has no average and one is asked for, or the network of its config cannot be built.
    """
    run, state = load_run(workdir, examples_seen, NETWORKS)
    config = saved_config(run)
    if average and "average" not in state:
        raise Mistake(
            f"{workdir} has no average of the weights, as its config.ema is {config.ema:g}: take "
            "the weights themselves, or train with config.ema=0.999."
        )
    if config.dtype == "float64":
        jax.config.update("jax_enable_x64", True)
    chosen = state["average"] if average else state
    return Model(config, chosen["params"], chosen["batch_stats"])
