"""What a run leaves, for use outside of it.

    from bigbatch import checkpoint
    model = checkpoint.load_model("WORKDIR")
    logits = model(images)                       # uint8, as they are in the data set
    averaged = checkpoint.load_model("WORKDIR", average=True)  # of a run with config.ema
    state = checkpoint.load("WORKDIR")           # only the arrays
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bigbatch.config import saved_config
from bigbatch.data import decode
from bigbatch.mistake import Mistake
from bigbatch.storage.checkpoint import load, load_run
from bigbatch.update import network
from bigbatch.update.evaluation import logits_of

__all__ = ["Model", "load", "load_model"]


class Model:
    """A trained network as evaluation uses it, from images as they are in the data set to logits.

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
        self._net = network.build(config)
        self._program = jax.jit(self.logits)
        self._on_device: Any = None

    def logits(self, params: Any, batch_stats: Any, images_BxHxWxC: jax.Array) -> jax.Array:
        """The logits as a function for JAX to transform: nothing is checked or cut into batches."""
        return logits_of(self.config, self._net, params, batch_stats, images_BxHxWxC)

    def __call__(self, images_NxHxWxC: np.ndarray) -> np.ndarray:
        """The logits (N, classes) of any number of images.

        At most `config.eval_batch_size` images are on the device at once. Smaller numbers are
        filled up to a power of two, so that few programs are compiled.

        Args:
            images_NxHxWxC: uint8, as they are in the data set: cropping and normalisation are done
                here. Of files of photographs `decode` makes them.

        Raises:
            Mistake: if they are of another type or shape.
        """
        images = np.asarray(images_NxHxWxC)
        self.check(images.shape, images.dtype)
        if self._on_device is None:
            self._on_device = jax.device_put((self.params, self.batch_stats))
        most = self.config.eval_batch_size
        size = min(most, 1 << max(0, len(images) - 1).bit_length())
        batches = []
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            filled = np.pad(batch, [(0, size - len(batch)), *[(0, 0)] * 3])
            batches.append(np.asarray(self._program(*self._on_device, filled))[: len(batch)])
        dtype = jnp.promote_types(self.config.dtype, jnp.float32)
        return np.concatenate([np.zeros((0, self.config.data.num_classes), dtype), *batches])

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
    """The network of a run's checkpoint, ready to be called on images.

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
    run, state = load_run(workdir, examples_seen)
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
