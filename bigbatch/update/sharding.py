"""Which arrays of a state are split over the devices, and along which of their axes.

The one rule: an array is cut along its longest axis that the number of devices divides. It is whole
on each device where there is none, where it has one axis only (biases, the scales of norms), or
where it has fewer numbers than `config.sharding.smallest`: cutting these saves nothing, and each
array that is cut is one more for the network to carry. `config.sharding.axes` says otherwise of
chosen arrays.

What belongs to a parameter (an accumulator of the optimizer, an average) is cut as it is. Running
statistics are whole. Nothing here changes a shape: a split state is the same tree of the same
arrays, so a checkpoint of it goes on with any other split.
"""

import copy
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from bigbatch.mistake import Mistake

Tree = Any
WHOLE = -1  # in the place of an axis


class Split(NamedTuple):
    """How a run's parameters, and all that belongs to them, are split."""

    axes: Tree  # like the parameters: the axis along which each is cut, or WHOLE
    # Whether parameters lie in pieces between updates too. False: on each device as a whole.
    parameters: bool
    over: str  # the mesh's axis along which devices hold different pieces
    mesh_axes: tuple[str, ...]  # all of the mesh, with `over` as the last
    devices: int  # of the mesh
    shards: int  # of these the ones along `over`: how many pieces an array has
    # Whether the compiler merges the collectives of many arrays, so that each may have its own.
    by_array: bool

    @property
    def cuts(self) -> bool:
        """Whether any array is cut."""
        return any(axis != WHOLE for axis in jax.tree.leaves(self.axes))

    @property
    def groups(self) -> int:
        """Into how many groups of examples a pass is divided whose gradients are known apart.

        Each device is one, but those that share parameters in pieces are one together.
        """
        return self.devices // self.shards if self.parameters and self.cuts else self.devices

    def at_rest(self) -> Tree:
        """The specs of the parameters between updates."""
        return jax.tree.map(self.spec if self.parameters else lambda _: P(), self.axes)

    def spec(self, axis: int) -> P:
        """The spec of an array that is cut along an axis, or WHOLE."""
        return P() if axis == WHOLE else P(*[None] * axis, self.over)

    def piece_shape(self, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
        """The shape of a piece of an array of this shape that is cut along an axis, or WHOLE."""
        return tuple(length // self.shards if at == axis else length
                     for at, length in enumerate(shape))


def split_of(config: ConfigDict, params: Tree, mesh: Mesh) -> Split:
    """How `config.sharding` splits a network's parameters, and all that belongs to them.

    Args:
        config: of the run.
        params: their shapes.
        mesh: the devices.

    Raises:
        Mistake: if `config.sharding.axes` fits no parameter, or an axis it names cannot be cut.
    """
    options, over = config.sharding, mesh.axis_names[-1]
    shards = mesh.shape[over]
    rules = _rules(options, params)

    def axis_of(path: tuple, leaf: jax.ShapeDtypeStruct) -> int:
        if not (options.optimizer or options.parameters) or shards == 1:
            return WHOLE
        for pattern, axis in rules:
            if fnmatchcase(_name(path), pattern):
                return WHOLE if axis is None else _checked(axis, pattern, _name(path), leaf, shards)
        if len(leaf.shape) < 2 or leaf.size < options.smallest:
            return WHOLE
        lengths = [length if length % shards == 0 else 0 for length in leaf.shape]
        return lengths.index(max(lengths)) if any(lengths) else WHOLE

    axes = jax.tree_util.tree_map_with_path(axis_of, params)
    return Split(axes, options.parameters, over, mesh.axis_names, mesh.size, shards,
                 by_array=mesh.devices.flat[0].platform == "tpu")


def state_sharding(config: ConfigDict, shapes: Any, mesh: Mesh) -> Any:
    """The sharding of each array of a state, in the same tree.

    Args:
        config: of the run.
        shapes: of an `update.State`, or the arrays.
        mesh: the devices.

    Raises:
        Mistake: see `split_of`.
    """
    split = split_of(config, shapes.params, mesh)
    whole = NamedSharding(mesh, P())
    cut = jax.tree.map(lambda axis: NamedSharding(mesh, split.spec(axis)), split.axes)
    statistics = jax.tree.map(lambda _: whole, shapes.batch_stats)
    average = shapes.average and {"params": cut, "batch_stats": statistics}
    return shapes._replace(
        params=cut if split.parameters else jax.tree.map(lambda _: whole, cut),
        batch_stats=statistics,
        opt_state=_as_their_parameters(shapes.opt_state, shapes.params, cut, whole),
        average=average,
    )


def for_any_devices(config: ConfigDict) -> ConfigDict:
    """A copy of a run's config that splits its state over any number of devices.

    What the run's user says of axes may fit only the devices that the run had, and groups too.
    """
    config = copy.deepcopy(config)
    config.sharding.axes, config.sharding.shards = (), 0
    return config


def notes(config: ConfigDict, params: Tree, mesh: Mesh) -> list[str]:
    """What a user should know of a split that leaves most of the parameters whole, as a list."""
    options, split = config.sharding, split_of(config, params, mesh)
    if not (options.optimizer or options.parameters) or split.shards == 1:
        return []
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    cut = sum(size for size, axis in zip(sizes, jax.tree.leaves(split.axes), strict=True)
              if axis != WHOLE)
    if 2 * cut > sum(sizes):
        return []
    return [f"config.sharding cuts {cut / sum(sizes):.0%} of the parameters: the others have no "
            f"axis that {split.shards} devices divide, or are smaller than sharding.smallest, "
            f"{options.smallest}, so each device holds them whole"]


def pieces_at_rest(split: Split, params: Tree) -> Tree:
    """The shapes of what one device holds of the parameters between updates.

    Args:
        split: how they are split.
        params: the shapes of the whole.
    """
    def one(leaf: jax.ShapeDtypeStruct, axis: int) -> jax.ShapeDtypeStruct:
        shape = split.piece_shape(leaf.shape, axis) if split.parameters else leaf.shape
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree.map(one, params, split.axes)


def is_split(state: Any) -> bool:
    """Whether any array of a state, or of its shapes, is cut over devices; no NumPy array is."""
    return any(hasattr(leaf, "sharding") and not leaf.sharding.is_fully_replicated
               for leaf in jax.tree.leaves(state))


def specs_of(shardings: Tree) -> Tree:
    """The specs of a tree of shardings, as `jax.shard_map` takes them."""
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


def _as_their_parameters(
    opt_state: Tree, params: Tree, cut: Tree, whole: NamedSharding
) -> Tree:
    """The shardings of an optimizer's state: an accumulator's path ends with its parameter's."""
    shapes = dict(jax.tree_util.tree_leaves_with_path(params))
    shardings = dict(jax.tree_util.tree_leaves_with_path(cut))

    def one(path: tuple, leaf: Any) -> NamedSharding:
        for start in range(len(path)):
            found = path[start:]
            if found in shapes and shapes[found].shape == leaf.shape:
                return shardings[found]
        return whole

    return jax.tree_util.tree_map_with_path(one, opt_state)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _rules(options: ConfigDict, params: Tree) -> tuple[tuple[str, int | None], ...]:
    """`config.sharding.axes`, checked as far as the patterns go."""
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for rule in options.axes:
        if not (isinstance(rule, tuple | list) and len(rule) == 2 and isinstance(rule[0], str)
                and (rule[1] is None or type(rule[1]) is int)):
            raise Mistake(
                f"config.sharding.axes has {rule!r}; it takes pairs of a pattern and an axis, such "
                "as (('blocks/*/kernel', 0),), or None in the place of an axis.")
        if not any(fnmatchcase(name, rule[0]) for name in names):
            raise Mistake(
                f"config.sharding.axes has the pattern {rule[0]!r}, which fits no parameter; there "
                f"are {', '.join(names[:3])} and {max(len(names) - 3, 0)} more.")
    return tuple(map(tuple, options.axes))


def _checked(
    axis: int, pattern: str, name: str, leaf: jax.ShapeDtypeStruct, shards: int
) -> int:
    """The axis that a rule names, if it can be cut."""
    if not 0 <= axis < len(leaf.shape) or leaf.shape[axis] % shards:
        allowed = [at for at, length in enumerate(leaf.shape) if length % shards == 0]
        raise Mistake(
            f"config.sharding.axes cuts {pattern!r} along axis {axis}, but {name} has the shape "
            f"{leaf.shape}, which {shards} devices cannot share there; possible for it "
            f"{'are ' + ', '.join(map(str, allowed)) if allowed else 'is only None'}.")
    return axis
