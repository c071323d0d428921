"""The mesh of devices and how the host's arrays get onto it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"  # the mesh's one axis


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices on one axis, in an order that suits the network between them; by default all of
    all processes.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), (AXIS,), (jax.sharding.AxisType.Auto,), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on each device."""
    return NamedSharding(mesh, P())


def cut(mesh: Mesh) -> NamedSharding:
    """The leading axis cut over the devices."""
    return NamedSharding(mesh, P(AXIS))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """NumPy arrays, the same on every process, as arrays on the devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(array: np.ndarray) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(one, tree)


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """What XLA is told in compiling for these devices, beyond its defaults."""
    if mesh.devices.flat[0].platform == "cpu":
        # YNNPACK takes sums several times sooner than XLA's own code, but by default it is given
        # products and convolutions too, which take it longer.
        return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    return None


def shape_of(array: jax.Array) -> jax.ShapeDtypeStruct:
    """What a program needs to know of an array to be compiled for it."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
