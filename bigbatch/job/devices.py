"""The mesh of devices, and how arrays of the host are put on it."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXIS = "data"  # the mesh's one axis


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis over `devices`, by default all devices of all processes.

    JAX chooses their order for the network between them.
    """
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh(
        (len(devices),), (AXIS,), (jax.sharding.AxisType.Auto,), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that has the whole array on each device."""
    return NamedSharding(mesh, P())


def cut(mesh: Mesh) -> NamedSharding:
    """The sharding that cuts the leading axis over the devices."""
    return NamedSharding(mesh, P(AXIS))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts a tree of NumPy arrays, which is the same on every process, on the devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(array: np.ndarray) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(one, tree)


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """The XLA options for compiling for this mesh, where they differ from the defaults."""
    if mesh.devices.flat[0].platform == "cpu":
        # YNNPACK computes sums several times faster than XLA's own code, but matrix products and
        # convolutions, which XLA gives it by default, more slowly.
        return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    return None


def shape_of(array: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape, type and sharding of `array`, for which a program can be compiled."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
