"""The arrays of a state in a folder or a bucket, written and read by TensorStore.

Each array is one of Zarr's (version 3) in an OCDBT database, which is the format of Orbax, and each
chunk has a CRC-32C, which TensorStore checks whenever it reads the chunk. A process writes the
pieces that it owns into a database of its own, `ocdbt.process_<its number>`, and waits for nobody.
The first process then merges the databases: it writes which of them has which chunk, and copies no
chunk. A process that reads takes from there the chunks that its devices need and no others.
"""

import contextlib
import itertools
import math
import shutil
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import Sharding

from bigbatch.storage import tree
from bigbatch.storage.workdir import plain_path

CHUNK_BYTES = 16 << 20  # at most, unless a piece cannot be cut evenly
IN_FLIGHT_BYTES = 256 << 20  # that are being written or read at the same time
OF_PROCESS = "ocdbt.process_"  # how the name of a process's database begins
NODES = "n/"  # where a process's database keeps what is neither a chunk nor its manifest

_spare: list[np.ndarray] = []  # memory for copies, see `_copies`
_of_spare = threading.Lock()  # the loop takes from it, and the saves' thread adds to it

Start = tuple[int, ...]  # where a piece begins in its array, one number an axis


class Layout(NamedTuple):
    """An array as a whole."""

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]  # the shape of a chunk


class Piece(NamedTuple):
    """A part of an array that no other process has, or that none with a lower number has."""

    name: str
    start: Start
    data: np.ndarray


class Part(NamedTuple):
    """What one process writes of a state."""

    layouts: Mapping[str, Layout]  # of all arrays, by name
    pieces: list[Piece]  # those of this process
    memory: list[np.ndarray]  # of the pieces, where a later save may use it again
    owners: tuple[int, ...]  # the processes that own pieces, and always the first one


def part_of(state: Any) -> Part:
    """Copies to the host what this process writes of `state`, and returns when it is there.

    Each piece of an array belongs to the first of the processes whose devices have it. So the first
    process writes alone what is whole on every device, and NumPy arrays. On the CPU nothing is
    copied: JAX gives a donated buffer new memory where somebody still looks at the old.

    Args:
        state: a tree of arrays with any sharding, the same tree on every process.
    """
    me = jax.process_index()
    layouts, mine, owners = {}, [], {0}
    for name, array in tree.arrays_of(state).items():
        shape = piece = array.shape
        if isinstance(array, jax.Array):
            owner_of = _owners(array.sharding, shape)
            piece = array.sharding.shard_shape(shape)
            here = {_start(shard.index): shard.data for shard in array.addressable_shards}
        else:
            owner_of, here = {(0,) * len(shape): 0}, {(0,) * len(shape): np.array(array)}
        layouts[name] = Layout(shape, array.dtype.name, _chunk(shape, piece, array.dtype.itemsize))
        owners.update(owner_of.values())
        mine += [(name, start, data) for start, data in here.items() if owner_of[start] == me]
    for _, _, data in mine:
        if isinstance(data, jax.Array):
            data.copy_to_host_async()  # so that the copies below overlap
    copies, memory = _copies([data for _, _, data in mine])
    return Part(layouts, [Piece(name, start, copy)
                          for (name, start, _), copy in zip(mine, copies, strict=True)],
                memory, tuple(sorted(owners)))


def _copies(pieces: Sequence[Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Copies of pieces on the host, and those of them that leave their memory to later saves.

    Of an array on a CPU NumPy only looks at the buffer, and an update that is to take this buffer
    over then asks for new memory instead, which a system may give ten times slower than it copies.
    So pieces are copied into memory that `make_room` has made or `write` has left, and only looked
    at where there is none.
    """
    copies, memory, to_copy = [], [], []
    for piece in pieces:
        copy = there = np.asarray(piece)
        if isinstance(piece, jax.Array) and piece.device.platform == "cpu":
            with _of_spare:
                fits = [number for number, spare in enumerate(_spare)
                        if (spare.shape, spare.dtype) == (there.shape, there.dtype)]
                if fits:
                    copy = _spare.pop(fits[0])
                    to_copy.append((copy, there))
            memory.append(copy)
        copies.append(copy)
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda pair: np.copyto(*pair), to_copy))
    return copies, memory


def make_room(state: Any) -> None:
    """Makes the memory for the copies of the first save, where this process's devices are CPUs.

    Args:
        state: a tree of arrays with shardings, or of their shapes and types.
    """
    with _of_spare:
        _spare.clear()  # what another run has left
    for array in jax.tree.leaves(state):
        if next(iter(array.sharding.device_set)).platform == "cpu":
            owners = _owners(array.sharding, array.shape).values()
            for _ in range(list(owners).count(jax.process_index())):
                memory = np.empty(array.sharding.shard_shape(array.shape), array.dtype)
                memory.fill(0)  # a system gives memory when it is first written to
                with _of_spare:
                    _spare.append(memory)


@lru_cache(maxsize=1024)  # each save asks the same of the same arrays
def _owners(sharding: Sharding, shape: tuple[int, ...]) -> Mapping[Start, int]:
    """Which process writes the piece that begins there."""
    owners: dict[Start, int] = {}
    for device, index in sharding.devices_indices_map(shape).items():
        start = _start(index)
        owners[start] = min(owners.get(start, device.process_index), device.process_index)
    return owners


def _start(index: Sequence[slice]) -> Start:
    return tuple(along.start or 0 for along in index)


def _chunk(shape: Sequence[int], piece: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """The shape of the chunks of an array that is cut into pieces of the shape `piece`.

    A piece is whole chunks. An axis along which the array is not cut may end with a shorter chunk.
    An axis that cannot be divided into about as many as are needed stays whole.
    """
    chunk = [max(1, length) for length in piece]
    for axis, length in enumerate(chunk):
        needed = min(length, -(-math.prod(chunk) * itemsize // CHUNK_BYTES))
        if length == shape[axis]:
            chunk[axis] = -(-length // needed)
        else:
            chunk[axis] = next(
                (length // count for count in range(needed, min(4 * needed, length) + 1)
                 if length % count == 0), length)
    return tuple(chunk)


# --- writing --------------------------------------------------------------------------------------
def write(folder: Path, part: Part) -> Path:
    """Writes this process's part into a database of its own in `folder`, in place of what is there.

    The pieces are taken out of `part`, so that memory that is not used again is free once they are
    written.

    Returns:
        The folder of the database.

    Raises:
        ValueError: if it cannot be written; the text is TensorStore's.
    """
    first = jax.process_index() == 0
    own = folder / f"{OF_PROCESS}{jax.process_index()}"
    shutil.rmtree(own, ignore_errors=True)
    own.mkdir()
    with _base(own) as base:
        if first:  # it describes all arrays
            with ts.Transaction(atomic=True) as transaction:
                _opened(base, part.layouts, transaction=transaction, create=True)
        stores = _opened(base, {piece.name: part.layouts[piece.name] for piece in part.pieces},
                         open=True, assume_metadata=True)
        for blocks in _loads(_blocks(part)):
            with ts.Transaction(atomic=True) as transaction:
                writes = []  # one that nobody holds is cancelled
                for name, start, data in blocks:
                    where = tuple(slice(along, along + length)
                                  for along, length in zip(start, data.shape, strict=True))
                    writes.append(stores[name].with_transaction(transaction)[where].write(
                        data, can_reference_source_data_indefinitely=True))
    with _of_spare:
        del _spare[len(part.memory):]  # two saves may be under way
    while part.memory:
        memory = part.memory.pop()
        memory = memory if memory.flags.writeable else np.full_like(memory, 0)  # not JAX's own
        with _of_spare:
            _spare.append(memory)
    return own


def _loads(blocks: Iterator[Piece]) -> Iterator[list[Piece]]:
    """The blocks in lists of about `IN_FLIGHT_BYTES`."""
    load, size = [], 0
    for block in blocks:
        load.append(block)
        size += block.data.nbytes
        if size >= IN_FLIGHT_BYTES:
            yield load
            load, size = [], 0
    if load:
        yield load


def is_node(file: str) -> bool:
    """Whether `merge` reads this file of a process's database, by its path."""
    return file.endswith("/manifest.ocdbt") or f"/{NODES}" in file


def _blocks(part: Part) -> Iterator[Piece]:
    """The pieces in whole chunks, each once."""
    while part.pieces:
        name, start, data = part.pieces.pop()
        chunk = part.layouts[name].chunk
        for corner in itertools.product(*map(range, [0] * data.ndim, data.shape, chunk)):
            block = data[tuple(slice(at, at + length)
                               for at, length in zip(corner, chunk, strict=True))]
            yield Piece(name, tuple(map(sum, zip(start, corner, strict=True))), block)


def merge(folder: Path, part: Part) -> None:
    """Makes one database in `folder` of those that the processes have written there.

    Of the others' only the manifest and the nodes are read.

    Raises:
        ValueError: if one of them cannot be read, or a chunk is in none of them.
    """
    context = ts.Context()  # one for all, or nothing could be copied by reference
    with _base(folder) as base:
        merged = _database(base, context)
        with ts.Transaction(atomic=True) as transaction:
            for process in part.owners:
                one = _database(
                    base | {"path": f"{base['path']}{OF_PROCESS}{process}/"}, context)
                one.experimental_copy_range_to(merged.with_transaction(transaction)).result()
        there = {key.decode() for key in merged.list().result()}
    wanted = set(itertools.chain.from_iterable(map(_keys, part.layouts, part.layouts.values())))
    if missing := sorted(wanted - there):
        raise ValueError(f"{len(missing)} of {len(wanted)} chunks are missing, as {missing[0]}")


def _keys(name: str, layout: Layout) -> Iterator[str]:
    """The keys under which a database has an array."""
    yield f"{name}/zarr.json"
    grid = [range(-(-length // along))
            for length, along in zip(layout.shape, layout.chunk, strict=True)]
    for chunk in itertools.product(*grid):
        yield "/".join([name, "c", *map(str, chunk)])


# --- reading --------------------------------------------------------------------------------------
class Place(NamedTuple):
    """Where the arrays of a checkpoint are."""

    where: Path | tuple[str, str]  # a folder; or a bucket of Google, and the path in it
    zarr3: bool  # False: Zarr's version 2, as Orbax wrote them for older versions


def shapes(place: Place, names: Sequence[str]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and types of arrays, by name.

    Raises:
        ValueError: if one of them is not there; the text is TensorStore's.
    """
    with _base(place.where) as base:
        stores = _opened(base, dict.fromkeys(names), place.zarr3, open=True)
    return {name: jax.ShapeDtypeStruct(store.shape, store.dtype.numpy_dtype)
            for name, store in stores.items()}


def read(place: Place, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Reads arrays, and of each only what the devices of this process hold.

    Args:
        place: where they are.
        wanted: for each name an array, or a shape and type. Where that has a sharding, a jax.Array
            with this sharding is returned, and otherwise a NumPy array.

    Raises:
        ValueError: if an array is not there, has another shape, or a chunk of it is damaged.
    """
    landed: dict[str, list[Any]] = {name: [] for name in wanted}
    under_way: deque[tuple[int, str, list, ts.Future]] = deque()  # bytes, name, devices, numbers

    def land() -> int:
        size, name, devices, numbers = under_way.popleft()
        pieces = [jax.device_put(numbers.result(), device) for device in devices]
        landed[name] += jax.block_until_ready(pieces) or [numbers.result()]
        return size

    with _base(place.where) as base:
        stores = _opened(base, dict.fromkeys(wanted), place.zarr3, open=True)
        room = IN_FLIGHT_BYTES
        for name, like in wanted.items():
            store = _checked(name, stores[name], like)
            chunk = math.prod(store.chunk_layout.read_chunk.shape or ())  # is decoded as a whole
            for index, devices in _places(like):
                size = (math.prod(store[index].shape) + chunk) * like.dtype.itemsize
                while under_way and size > room:
                    room += land()
                under_way.append((size, name, devices, store[index].read()))
                room -= size
        while under_way:
            land()
    return {name: _assembled(wanted[name], pieces) for name, pieces in landed.items()}


def _checked(name: str, store: ts.TensorStore, like: Any) -> ts.TensorStore:
    """The array, in the type of `like`; raises ValueError if it has another shape."""
    saved, needed = tuple(store.shape), tuple(like.shape)
    if saved != needed:
        raise ValueError(f"{name} has the shape {saved}, and {needed} is needed")
    same = store.dtype.numpy_dtype == like.dtype
    return store if same else ts.cast(store, ts.dtype(like.dtype))


def _places(like: Any) -> list[tuple[tuple[slice, ...], list[jax.Device]]]:
    """Each piece of an array that this process reads, and the devices for which it does."""
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return [((slice(None),) * len(like.shape), [])]
    places: dict[Start, tuple[tuple[slice, ...], list[jax.Device]]] = {}
    for device, index in sharding.addressable_devices_indices_map(tuple(like.shape)).items():
        places.setdefault(_start(index), (index, []))[1].append(device)
    return list(places.values())


def _assembled(like: Any, pieces: list[Any]) -> Any:
    """The array of which these are the pieces of this process."""
    sharding = getattr(like, "sharding", None)
    if sharding is None:
        return pieces[0]
    return jax.make_array_from_single_device_arrays(tuple(like.shape), sharding, pieces)


# --- TensorStore ----------------------------------------------------------------------------------
@contextlib.contextmanager
def _base(where: Path | tuple[str, str]) -> Iterator[dict[str, Any]]:
    """What is below a database, for the time of the block."""
    if isinstance(where, tuple):
        yield {"driver": "gcs", "bucket": where[0], "path": f"{where[1]}/"}
    else:
        with plain_path(where) as plain:
            yield {"driver": "file", "path": f"{plain}/"}


def _opened(
    base: Mapping[str, Any], layouts: Mapping[str, Layout | None], zarr3: bool = True, **how: Any
) -> dict[str, ts.TensorStore]:
    """Opens arrays of the database at `base`; a layout is needed only where they are written."""
    opening, context = {}, ts.Context()
    for name, layout in layouts.items():
        spec: dict[str, Any] = {
            "driver": "zarr3" if zarr3 else "zarr",
            "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"},
        }
        if layout is None:
            spec["fill_missing_data_reads"] = False
        else:
            spec["kvstore"] |= {"btree_node_data_prefix": NODES,
                                "version_tree_node_data_prefix": NODES}
            spec |= {"store_data_equal_to_fill_value": True, "metadata": _metadata(layout)}
        opening[name] = ts.open(spec, context=context, **how)
    return {name: future.result() for name, future in opening.items()}


def _metadata(layout: Layout) -> dict[str, Any]:
    return {
        "shape": layout.shape, "data_type": layout.dtype,
        "fill_value": False if layout.dtype == "bool" else 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": layout.chunk}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }


def _database(base: Mapping[str, Any], context: ts.Context) -> ts.KvStore:
    return ts.KvStore.open({"driver": "ocdbt", "base": base}, context=context).result()
