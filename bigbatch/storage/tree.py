"""The tree of a state as a checkpoint writes it down: in the words of Orbax's PyTree format.

Each array has a name, its keys joined by dots, as in "params.head.kernel". The file `_METADATA`
says which keys are of lists and which of dicts, and where nothing is.
"""

import json
from ast import literal_eval
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.tree_util import SequenceKey

FILE = "_METADATA"
_LIST, _DICT = 1, 2  # Orbax's numbers for the kinds of keys
_EMPTY = {"None": None, "NamedTuple": None, "Dict": {}, "List": [], "Tuple": ()}


class _Entry(NamedTuple):
    """A place of the tree that has no further ones in it."""

    keys: tuple[str, ...]
    kinds: tuple[int, ...]  # one a key
    value: Any


def arrays_of(state: Any) -> dict[str, Any]:
    """The arrays of a tree by name."""
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def with_arrays(like: Any, arrays: Mapping[str, Any]) -> Any:
    """The tree of `like` with the arrays of these names in place of its own."""
    return jax.tree_util.tree_map_with_path(lambda path, _: arrays[_name(path)], like)


def written(state: Any) -> str:
    """The content of `_METADATA` for a state.

    Of a named tuple the fields that are None are left out, so that a later version may add one.
    """
    if hasattr(state, "_asdict"):
        state = {key: field for key, field in state._asdict().items() if field is not None}
    described = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_empty):
        keys = tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
        kinds = [_LIST if isinstance(key, SequenceKey) else _DICT for key in path]
        described[str(keys)] = {
            "key_metadata": [{"key": key, "key_type": kind}
                             for key, kind in zip(keys, kinds, strict=True)],
            "value_metadata": {
                "value_type": _empty_type(leaf) if _is_empty(leaf) else "np.ndarray",
                "skip_deserialize": _is_empty(leaf)},
        }
    return json.dumps({"tree_metadata": described, "use_ocdbt": True, "use_zarr3": True,
                       "store_array_data_equal_to_fill_value": True, "custom_metadata": None})


def uses_zarr3(text: str) -> bool:
    """Whether the arrays beside a `_METADATA` with this content are Zarr's version 3, not 2."""
    return json.loads(text)["use_zarr3"]


def read(text: str) -> Any:
    """The tree of a `_METADATA` with this content: nested dicts and lists, names for arrays."""
    entries = []
    for path, entry in json.loads(text)["tree_metadata"].items():
        kinds = tuple(key["key_type"] for key in entry["key_metadata"])
        keys, value = literal_eval(path), entry["value_metadata"]
        entries.append(_Entry(keys, kinds, _EMPTY[value["value_type"]] if value["skip_deserialize"]
                              else ".".join(keys)))
    return _built(entries) if entries else {}


def _built(entries: list[_Entry]) -> Any:
    if not entries[0].keys:
        return entries[0].value
    below: dict[str, list[_Entry]] = {}
    for keys, kinds, value in entries:
        below.setdefault(keys[0], []).append(_Entry(keys[1:], kinds[1:], value))
    if entries[0].kinds[0] == _LIST:
        return [_built(below[key]) for key in sorted(below, key=int)]
    return {key: _built(group) for key, group in below.items()}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_empty(value: Any) -> bool:
    """Whether nothing is there, which JAX leaves out where it lists a tree's leaves."""
    return value is None or (isinstance(value, dict | list | tuple) and not value)


def _empty_type(value: Any) -> str:
    return {dict: "Dict", list: "List"}.get(type(value), "None")
