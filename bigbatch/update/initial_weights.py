"""The weights that a new run begins with where `config.init_from` names another run or a file.

Arrays are matched by name (`params/head/kernel`, `batch_stats/norm/mean`), as `bigbatch-export`
writes them. Every array of the network must be there in its shape, and nothing else, but for the
layers that `config.init_anew` names: these begin as the config's seed has it.
"""

import contextlib
import hashlib
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bigbatch.job import processes
from bigbatch.mistake import Mistake
from bigbatch.storage import checkpoint

Tree = Any
SHOWN = 5  # misfits in a message


def read(config: ConfigDict, shapes: Any) -> dict[str, Any]:
    """The arrays to begin with, by their names in the state; {} where there are none.

    Of a run each process reads what its devices hold, as where a run is continued. A file it reads
    as a whole. All processes must find the same.

    Args:
        config: of the new run.
        shapes: of its state, with how each array lies on the devices; `update.abstract_state`.

    Raises:
        Mistake: if they cannot be read or do not fit the network; the text lists the misfits.
    """
    source = config.init_from
    anew = tuple(str(layer).replace(".", "/").strip("/") for layer in config.init_anew)
    if not source:
        if anew:
            raise Mistake(f"config.init_anew is {config.init_anew}, but config.init_from is empty.")
        return {}
    network = {"params": shapes.params, "batch_stats": shapes.batch_stats}
    if unknown := [layer for layer in anew
                   if not any(_within(name, [layer]) for name in names(network))]:
        raise Mistake(
            f"config.init_anew names {', '.join(unknown)}, which the network has not; it has "
            f"{', '.join(sorted({name.split('/')[1] for name in names(network)}))}."
        )

    def without_anew(tree: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: None if _within(name_of(path), anew) else leaf, tree)

    def check(found: Mapping[str, Any]) -> None:
        _check(source, {name: array for name, array in found.items() if not _within(name, anew)},
               names(without_anew(network)))

    wanted = {"": without_anew(network)}
    if shapes.average:  # begins with the same, in arrays of its own: an update takes all over
        wanted["average/"] = without_anew(shapes.average)
    of_source = _of_file if source.endswith(".npz") else _of_run
    return {before + name: array for before, tree in of_source(source, wanted, check).items()
            for name, array in names(tree).items()}


def names(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts by name, such as params/head/kernel."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def name_of(path: tuple) -> str:
    """The name of the leaf at a path of JAX's, such as params/head/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def put(state: Any, arrays: Mapping[str, Any]) -> Any:
    """A state before the first update, with `arrays` in their places; see `read`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: arrays.get(name_of(path), leaf), state)


def _within(name: str, layers: tuple[str, ...] | list[str]) -> bool:
    """Whether the array `name` is of one of the layers, or of a layer inside it."""
    path = name.partition("/")[2]
    return any(path == layer or path.startswith(layer + "/") for layer in layers)


def _of_run(
    source: str, wanted: Mapping[str, Tree], check: Callable[[Mapping[str, Any]], None]
) -> dict[str, Tree]:
    """The newest checkpoint's arrays in the place of each shape; where it lies on devices, there.

    Args:
        source: the workdir.
        wanted: trees of shapes.
        check: is called with the shapes of what is there, by name.
    """
    with contextlib.ExitStack() as block:
        try:
            found = block.enter_context(checkpoint.opened(source, in_job=True))
        except Mistake as mistake:
            raise Mistake(f"config.init_from: {mistake}") from None
        _check_same(source, checkpoint.identity(found))
        check(names(checkpoint.shapes(found, ("params", "batch_stats"))))
        return {key: checkpoint.restore(found.path, tree, found.mirror)
                for key, tree in wanted.items()}


def _of_file(
    source: str, wanted: Mapping[str, Tree], check: Callable[[Mapping[str, Any]], None]
) -> dict[str, Tree]:
    """As `_of_run`, of an .npz file, in whole NumPy arrays."""
    try:
        with np.load(Path(source).expanduser()) as file:
            there = {name: file[name] for name in file.files if name != "config"}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or error
        raise Mistake(
            f"config.init_from is {source}, which cannot be read: {reason}; it must be an .npz "
            "file of bigbatch-export, or the workdir of a run."
        ) from None
    check(there)
    digest = hashlib.sha256()
    for name in sorted(there):
        digest.update(name.encode() + np.ascontiguousarray(there[name]).tobytes())
    _check_same(source, digest.hexdigest())
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: there[name_of(path[1:])].astype(leaf.dtype), dict(wanted))


def _check_same(source: str, digest: str) -> None:
    """Raises Mistake if this process found other weights than the first one."""
    if processes.decided_by_first("init_from", lambda: digest) != digest:
        raise Mistake(
            f"config.init_from is {source}, which has other weights here than on the job's first "
            "host: name a file or a folder that all hosts share and nothing writes to."
        )


def _check(
    source: str, found: Mapping[str, Any], needed: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    """Raises Mistake if the arrays found, or their shapes, are not those needed."""
    misfits = {name: f"{name} is missing" for name in needed if name not in found}
    misfits |= {name: f"the network has no {name}" for name in found if name not in needed}
    for name in found.keys() & needed.keys():
        if found[name].shape != needed[name].shape:
            misfits[name] = (
                f"{name} has the shape {found[name].shape}, in the network {needed[name].shape}")
        elif not jnp.issubdtype(found[name].dtype, jnp.floating):
            misfits[name] = f"{name} is {found[name].dtype}"
    if not misfits:
        return
    told = [misfits[name] for name in sorted(misfits)]
    more = f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else ""
    layers = {"/".join(name.split("/")[1:-1]) or name.split("/")[-1] for name in misfits}
    listed = "".join(f"'{layer}'," for layer in sorted(layers)[:SHOWN])
    raise Mistake(
        f"config.init_from is {source}, which does not fit the network: "
        f"{'; '.join(told[:SHOWN])}{more}. Should layers begin anew, name them: "
        f"config.init_anew=({listed})."
    )
