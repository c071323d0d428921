"""The mesh of devices, and how arrays of the host are put on it."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bigbatch.mistake import Mistake

AXIS = "data"  # the mesh's first axis, and often its only one
SHARDS = "shards"  # the second, where fewer devices than all hold one whole state between them


# JAX's options that a curve depends on, as every run has them. Each may be set otherwise by a
# variable of the environment, and a run is its config and its workdir.
PINNED = {
    "jax_default_matmul_precision": None,
    "jax_default_prng_impl": "threefry2x32",
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_random_seed_offset": 0,
    "jax_softmax_custom_jvp": False,
    "jax_threefry_partitionable": True,
}


def pin_options(dtype: str) -> None:
    """Sets JAX's options that a curve depends on, whatever the environment says.

    Args:
        dtype: that the network computes in; 64-bit arrays are on for float64, and off otherwise.
    """
    jax.config.update("jax_enable_x64", dtype == "float64")
    for name, value in PINNED.items():
        # Not every version of JAX has all of them.
        if name in jax.config.values and jax.config.values[name] != value:
            jax.config.update(name, value)


def make_mesh(devices: Sequence[jax.Device] | None = None, shards: int = 0) -> Mesh:
    """A mesh over `devices`, by default all devices of all processes.

    JAX chooses their order for the network between them, and neighbours in the last axis are near.

    Args:
        devices: see above.
        shards: `config.sharding.shards`. 0, or their number: the mesh has one axis. Otherwise two,
            of which the last has so many devices.

    Raises:
        Mistake: if JAX has no devices here, or `shards` does not divide their number.
    """
    devices = all_devices() if devices is None else devices
    count = len(devices)
    if shards and count % shards:
        allowed = [size for size in range(1, count + 1) if count % size == 0]
        raise Mistake(
            f"config.sharding.shards is {shards}, which does not divide the number of devices, "
            f"{count}; set it to 0, for all of them, or to one of "
            f"{', '.join(map(str, allowed))}."
        )
    shape, names = (count,), (AXIS,)
    if shards not in (0, count):
        shape, names = (count // shards, shards), (AXIS, SHARDS)
    return jax.make_mesh(
        shape, names, (jax.sharding.AxisType.Auto,) * len(shape), devices=devices)


def all_devices() -> list[jax.Device]:
    """All devices of all processes.

    Raises:
        Mistake: if JAX has none here, as where JAX_PLATFORMS asks for those of another machine.
    """
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second for a platform without its plugin
        asked = os.environ.get("JAX_PLATFORMS", "")
        said = " ".join(str(error).split()).rstrip(".") or "none were found"
        if not asked:
            raise Mistake(f"JAX cannot use the devices of this machine: {said}.") from None
        raise Mistake(
            f"JAX_PLATFORMS is {asked!r}, and JAX has no such devices here: {said}. Unset it for "
            "those that are there; in a checkout pip install '.[gpu]' or '.[tpu]' brings JAX for a "
            "GPU or a TPU."
        ) from None


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that has the whole array on each device."""
    return NamedSharding(mesh, P())


def cut(mesh: Mesh) -> NamedSharding:
    """The sharding that cuts the leading axis over all devices."""
    return NamedSharding(mesh, P(mesh.axis_names))


def place(tree: Any, sharding: Any) -> Any:
    """Puts a tree of NumPy arrays, which is the same on every process, on the devices.

    Args:
        tree: the arrays. Those that lie on the devices as they should stay there.
        sharding: of all of them, or a tree with one for each.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def one(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        if isinstance(array, jax.Array) and array.sharding == sharding:
            return array
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    if isinstance(sharding, NamedSharding):
        sharding = jax.tree.map(lambda _: sharding, tree)
    return jax.tree.map(one, tree, sharding)


def compiler_options(mesh: Mesh, deterministic: bool = False) -> dict[str, Any] | None:
    """The XLA options for compiling for this mesh, where they differ from the defaults.

    Args:
        mesh: the devices.
        deterministic: whether a GPU is to compute the same bits at every start. It then adds up
            nothing in the order in which threads arrive, and its compiler chooses algorithms by
            rules in the place of trying which one is fastest.
    """
    platform = mesh.devices.flat[0].platform
    if platform == "cpu":
        # YNNPACK computes sums several times faster than XLA's own code, but matrix products and
        # convolutions, which XLA gives it by default, more slowly.
        return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    if platform == "tpu":
        # How many arrays one reduction takes, 256 by default: a network may have a thousand.
        return {"xla_jf_crs_combiner_threshold_count": "65536"}
    return {"xla_gpu_deterministic_ops": True} if deterministic else None


def shape_of(array: jax.Array) -> jax.ShapeDtypeStruct:
    """The shape, type and sharding of `array`, for which a program can be compiled."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
