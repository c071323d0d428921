"""The weights that a new run begins with where `config.init_from` names another run or a file.

Arrays are matched by name (`params/head/kernel`, `batch_stats/norm/mean`), as `bigbatch-export`
writes them. Every array of the network must be there in its shape, and nothing else, but for the
layers that `config.init_anew` names: these begin as the config's seed has it.
"""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bigbatch.job import processes
from bigbatch.mistake import Mistake
from bigbatch.storage import checkpoint
from bigbatch.update.network import Network

SHOWN = 5  # misfits in a message


def read(config: ConfigDict, net: Network) -> dict[str, np.ndarray]:
    """The arrays to begin with, by name, in the network's types; {} where there are none.

    Every process reads them, and all must find the same.

    Raises:
        Mistake: if they cannot be read or do not fit the network; the text lists the misfits.
    """
    source = config.init_from
    anew = tuple(str(layer).replace(".", "/").strip("/") for layer in config.init_anew)
    if not source:
        if anew:
            raise Mistake(f"config.init_anew is {config.init_anew}, but config.init_from is empty.")
        return {}
    found = _arrays_of(source)
    needed = names({"params": net.params, "batch_stats": net.batch_stats})
    if unknown := [layer for layer in anew if not any(_within(name, [layer]) for name in needed)]:
        raise Mistake(
            f"config.init_anew names {', '.join(unknown)}, which the network has not; it has "
            f"{', '.join(sorted({name.split('/')[1] for name in needed}))}."
        )
    found = {name: array for name, array in found.items() if not _within(name, anew)}
    needed = {name: shape for name, shape in needed.items() if not _within(name, anew)}
    _check(source, found, needed)
    taken = {name: found[name].astype(needed[name].dtype) for name in sorted(needed)}
    digest = hashlib.sha256()
    for name, array in taken.items():
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    if processes.decided_by_first("init_from", digest.hexdigest) != digest.hexdigest():
        raise Mistake(
            f"config.init_from is {source}, which has other weights here than on the job's first "
            "host: name a file or a folder that all hosts share and nothing writes to."
        )
    return taken


def names(tree: Any) -> dict[str, Any]:
    """The leaves of nested dicts by name, such as params/head/kernel."""
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def name_of(path: tuple) -> str:
    """The name of the leaf at a path of JAX's, such as params/head/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def put(state: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """A state before the first update, with `arrays` in their places, also in an average."""
    def put_in(tree: Any) -> Any:
        def one(path: tuple, leaf: Any) -> Any:
            given = arrays.get(name_of(path))
            # Its own array, since an update takes over the memory of those it is given.
            return leaf if given is None else np.copy(given)

        return jax.tree_util.tree_map_with_path(one, tree)

    tree = put_in({"params": state.params, "batch_stats": state.batch_stats})
    return state._replace(**tree, average=state.average and put_in(state.average))


def _within(name: str, layers: tuple[str, ...] | list[str]) -> bool:
    """Whether the array `name` is of one of the layers, or of a layer inside it."""
    path = name.partition("/")[2]
    return any(path == layer or path.startswith(layer + "/") for layer in layers)


def _arrays_of(source: str) -> dict[str, np.ndarray]:
    if not source.endswith(".npz"):
        _, state = checkpoint.load_run(source, fields=("params", "batch_stats"))
        return names({"params": state["params"], "batch_stats": state.get("batch_stats", {})})
    try:
        with np.load(Path(source).expanduser()) as file:
            return {name: file[name] for name in file.files if name != "config"}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or error
        raise Mistake(
            f"config.init_from is {source}, which cannot be read: {reason}; it must be an .npz "
            "file of bigbatch-export, or the workdir of a run."
        ) from None


def _check(
    source: str, found: Mapping[str, np.ndarray], needed: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    """Raises Mistake if the arrays found are not those needed."""
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
