"""What each of JAX's operations does to the dependences of its operands.

A rule gets an equation and the dependences of its operands, and returns those of its results. What
it says is a lower bound: see `independence`.
"""

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from bigbatch.update.dependence import GHOSTS, Dependence, joined, relabelled


def _shape(atom: Any) -> tuple[int, ...]:
    return atom.aval.shape


def _outputs(equation: Any, result: Dependence) -> list[Dependence]:
    return [result] * len(equation.outvars)


def unknown(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """Of an operation that is not listed: only what all of its entries depend on is kept."""
    everywhere = joined(operands).everywhere
    return [
        Dependence(everywhere, {}, frozenset(range(len(_shape(out))))) for out in equation.outvars
    ]


def _elementwise(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    operands = [
        _stretched(operand, _shape(atom), _shape(equation.outvars[0]))
        for operand, atom in zip(operands, equation.invars, strict=True)
    ]
    drawn = frozenset().union(*(one.varies for one in operands if one.none and one.drawn))
    if any(bits.any() for one in operands for axis, bits in one.along.items() if axis in drawn):
        # Which number an example gets follows from its place among the others.
        return _outputs(equation, joined(operands)._replace(everywhere=(1 << GHOSTS) - 1))
    if equation.primitive.name in MASKING:
        operands = _masked(equation, operands)
    return _outputs(equation, joined(operands))


def _stretched(operand: Dependence, old: Sequence[int], new: Sequence[int]) -> Dependence:
    """What is left along axes of one entry: nothing varies there, and a longer axis repeats it."""
    along, everywhere = dict(operand.along), operand.everywhere
    for axis in operand.along:
        if old[axis] != new[axis]:
            everywhere |= int(along.pop(axis)[0])
    varies = frozenset(axis for axis in operand.varies if old[axis] > 1)
    return operand._replace(everywhere=everywhere, along=along, varies=varies)


def _masked(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """Drops what lies along an axis along which a constant varies: it may be 0 where it counts."""
    kept = []
    for at, operand in enumerate(operands):
        masks = [other for place, other in enumerate(operands) if place != at and other.none]
        hidden = frozenset().union(*(mask.varies for mask in masks))
        along = {axis: bits for axis, bits in operand.along.items() if axis not in hidden}
        kept.append(operand._replace(along=along))
    return kept


def _broadcast(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    places, shape = equation.params["broadcast_dimensions"], equation.params["shape"]
    old = _shape(equation.invars[0])

    def place(axis: int) -> int | None:
        return places[axis] if old[axis] == shape[places[axis]] else None

    result = relabelled(operands[0], place)
    for axis, bits in operands[0].along.items():
        if place(axis) is None:  # an axis of one entry, which all of the new ones depend on
            result = result._replace(everywhere=result.everywhere | int(bits[0]))
    return [result]


def _transpose(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    order = list(equation.params["permutation"])
    return [relabelled(operands[0], order.index)]


def _reduce(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    axes = equation.params["axes"]
    operand = joined(operands)
    left = [axis for axis in range(len(_shape(equation.invars[0]))) if axis not in axes]
    result = relabelled(operand, lambda axis: left.index(axis) if axis in left else None)
    everywhere = result.everywhere
    for axis in set(axes) & operand.along.keys():
        everywhere |= int(np.bitwise_or.reduce(operand.along[axis]))
    return _outputs(equation, result._replace(everywhere=everywhere))


def _reshape(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """Axis by axis: those whose sizes multiply to the same are a block, flattened and cut anew."""
    old, new = _shape(equation.invars[0]), _shape(equation.outvars[0])
    operand, along, varies = operands[0], {}, set()
    for before, after in _blocks(old, new):
        if operand.varies & set(before):
            varies |= set(after)
        sizes = [old[axis] for axis in before]
        bits = np.zeros(sizes, np.uint8)
        for axis in set(before) & operand.along.keys():
            shape = [old[axis] if other == axis else 1 for other in before]
            bits = bits | operand.along[axis].reshape(shape)
        if not bits.any():
            continue
        bits = bits.reshape([new[axis] for axis in after])
        for place, axis in enumerate(after):
            others = tuple(other for other in range(len(after)) if other != place)
            along[axis] = np.bitwise_and.reduce(bits, axis=others)
    return [Dependence(operand.everywhere, along, frozenset(varies))]


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest groups of neighbouring axes of both shapes that have as many entries."""
    blocks, at, to = [], 0, 0
    while at < len(old) or to < len(new):
        before, after, sizes = [], [], [1, 1]
        while True:
            if sizes[0] <= sizes[1] and at < len(old):
                sizes[0] *= old[at]
                before.append(at)
                at += 1
            elif to < len(new):
                sizes[1] *= new[to]
                after.append(to)
                to += 1
            if sizes[0] == sizes[1] or (at == len(old) and to == len(new)):
                break
        blocks.append((before, after))
    return blocks


def _squeeze(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    axes = equation.params["dimensions"]
    operand = operands[0]
    left = [axis for axis in range(len(_shape(equation.invars[0]))) if axis not in axes]
    result = relabelled(operand, lambda axis: left.index(axis) if axis in left else None)
    everywhere = result.everywhere
    for axis in set(axes) & operand.along.keys():
        everywhere |= int(operand.along[axis][0])
    return [result._replace(everywhere=everywhere)]


def _cut(cut: Callable[[Any, int, np.ndarray], np.ndarray]) -> Callable:
    """The rule of an operation that does `cut(parameters, axis, sets)` to each axis."""
    def rule(equation: Any, operands: list[Dependence]) -> list[Dependence]:
        operand = operands[0]
        along = {
            axis: cut(equation.params, axis, bits) for axis, bits in operand.along.items()
        }
        shape = _shape(equation.outvars[0])
        return [Dependence(operand.everywhere, along, frozenset(range(len(shape))))]

    return rule


def _sliced(parameters: Any, axis: int, bits: np.ndarray) -> np.ndarray:
    strides = parameters["strides"] or (1,) * (axis + 1)
    return bits[parameters["start_indices"][axis] : parameters["limit_indices"][axis]
                : strides[axis]]


def _padded(parameters: Any, axis: int, bits: np.ndarray) -> np.ndarray:
    low, high, inside = parameters["padding_config"][axis]
    spread = np.zeros(max(0, (len(bits) - 1) * (inside + 1) + 1), np.uint8)
    spread[:: inside + 1] = bits
    padded = np.concatenate([np.zeros(max(0, low), np.uint8), spread,
                             np.zeros(max(0, high), np.uint8)])
    return padded[max(0, -low) : len(padded) - max(0, -high)]


def _reversed(parameters: Any, axis: int, bits: np.ndarray) -> np.ndarray:
    return bits[::-1] if axis in parameters["dimensions"] else bits


def _concatenate(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    axis = equation.params["dimension"]
    shapes = [_shape(atom) for atom in equation.invars]
    # An entry comes from one operand, so only what all operands depend on is in every entry.
    everywhere = operands[0].everywhere
    for operand in operands[1:]:
        everywhere &= operand.everywhere
    along = {axis: np.concatenate([
        operand.along.get(axis, np.zeros(shape[axis], np.uint8)) | np.uint8(operand.everywhere)
        for operand, shape in zip(operands, shapes, strict=True)
    ])}
    # Along other axes this claims too much of a constant, such as a token put before each example's
    # own, but only what its neighbours depend on: else nothing would be known of what follows.
    together = joined(operands).along
    along |= {other: bits for other, bits in together.items() if other != axis}
    return [Dependence(everywhere, along, frozenset(range(len(shapes[0]))))]


def _stack(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """As a concatenation along the new axis, of which each operand is one entry."""
    new = equation.params["axis"]
    # What all of an operand's entries depend on lies along the new axis, the rest along its own.
    whole = [
        reduce(operator.or_, (int(np.bitwise_and.reduce(bits)) for bits in one.along.values()),
               one.everywhere)
        for one in operands
    ]
    rest = [
        one._replace(along={axis: bits & ~np.uint8(all_) for axis, bits in one.along.items()})
        for one, all_ in zip(operands, whole, strict=True)
    ]
    along = relabelled(joined(rest), lambda axis: axis + (axis >= new)).along
    return [Dependence(
        reduce(operator.and_, whole), along | {new: np.array(whole, np.uint8)},
        frozenset(range(len(_shape(equation.outvars[0])))),
    )]


def _dot(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    contracted, batched = equation.params["dimension_numbers"]
    everywhere, along, start = 0, {}, len(batched[0])
    for side, operand in enumerate(operands):
        other = operands[1 - side]
        everywhere |= operand.everywhere
        free = [axis for axis in range(len(_shape(equation.invars[side])))
                if axis not in contracted[side] and axis not in batched[side]]
        for axis, bits in operand.along.items():
            if axis in batched[side]:
                to = list(batched[side]).index(axis)
                along[to] = along[to] | bits if to in along else bits
            elif axis in free:
                along[start + free.index(axis)] = bits
            else:  # a sum over the axis; a constant on the other side may pick entries out of it
                opposite = contracted[1 - side][list(contracted[side]).index(axis)]
                if not other.none or opposite not in other.varies:
                    everywhere |= int(np.bitwise_or.reduce(bits))
        start += len(free)
    return [Dependence(everywhere, along, frozenset(range(len(_shape(equation.outvars[0])))))]


def _convolution(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """Only the axis of examples is followed, and what the kernel depends on everywhere."""
    numbers = equation.params["dimension_numbers"]
    shape = _shape(equation.outvars[0])
    result = joined([operand._replace(along={}) for operand in operands])
    examples = operands[0].along.get(numbers.lhs_spec[0])
    if examples is not None and equation.params["batch_group_count"] == 1:
        result = result._replace(along={numbers.out_spec[0]: examples})
    return [result._replace(varies=frozenset(range(len(shape))))]


def _window(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """Of pooling, the axes with windows of one entry."""
    operand = joined(operands)
    sizes, shape = equation.params["window_dimensions"], _shape(equation.outvars[0])
    along = {axis: bits for axis, bits in operand.along.items()
             if sizes[axis] == 1 and shape[axis] == len(bits)}
    return _outputs(equation, Dependence(operand.everywhere, along, frozenset(range(len(shape)))))


def _dynamic_slice(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """Of a slice at a computed place, the axes that it takes whole."""
    shape = _shape(equation.outvars[0])
    along = {axis: bits for axis, bits in operands[0].along.items() if len(bits) == shape[axis]}
    everywhere = joined(operands).everywhere
    return [Dependence(everywhere, along, frozenset(range(len(shape))))]


def _gather(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """Of indexing by arrays, the axes that are taken whole, and those of one index an example."""
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    old, shape = _shape(equation.invars[0]), _shape(equation.outvars[0])
    batching = list(numbers.operand_batching_dims)
    left = [axis for axis in range(len(old))
            if axis not in batching and axis not in numbers.collapsed_slice_dims]
    of_indices = [axis for axis in range(len(shape)) if axis not in numbers.offset_dims]
    # What was looked up, such as the embedding of a token, depends on what the index does.
    along = {of_indices[axis]: bits for axis, bits in operands[1].along.items()
             if axis < len(of_indices)}
    for axis, bits in operands[0].along.items():
        if axis in batching:
            to = of_indices[numbers.start_indices_batching_dims[batching.index(axis)]]
        elif axis in left and sizes[axis] == old[axis]:
            to = numbers.offset_dims[left.index(axis)]
        else:
            continue
        along[to] = along[to] | bits if to in along else bits
    everywhere = joined(operands).everywhere
    return [Dependence(everywhere, along, frozenset(range(len(shape))))]


def _split(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """Of pieces along one axis: each has its own part of it, and the other axes whole."""
    axis, operand = equation.params["axis"], operands[0]
    ends = np.cumsum(equation.params["sizes"])[:-1]
    pieces = np.split(operand.along[axis], ends) if axis in operand.along else None
    return [
        operand._replace(along=operand.along | ({axis: pieces[at]} if pieces else {}))
        for at in range(len(equation.outvars))
    ]


def _attention(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """Of cuDNN's attention, the axis of examples, which is the first of all its arrays."""
    operand = joined(operands[:3])  # queries, keys, values
    along = {0: operand.along[0]} if 0 in operand.along else {}
    return [
        Dependence(operand.everywhere, along, frozenset(range(len(_shape(out)))))
        for out in equation.outvars
    ]


def _written(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """Of an array of which a part is written over: what is left of it keeps what it depends on."""
    return [operands[0]._replace(varies=frozenset(range(len(_shape(equation.outvars[0])))))]


def _per_line(key: str) -> Callable:
    """The rule of an operation along one axis, on whose every line it works alone."""
    def rule(equation: Any, operands: list[Dependence]) -> list[Dependence]:
        operand = joined(operands)
        along = dict(operand.along)
        bits, everywhere = along.pop(equation.params[key], None), operand.everywhere
        if bits is not None and key == "dimension":  # a sort; of a running sum nothing is claimed
            everywhere |= int(np.bitwise_or.reduce(bits))
        return _outputs(equation, Dependence(everywhere, along, operand.varies))

    return rule


def _leading(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    """Of random keys: the axes of the keys come first, and what is drawn from one follows."""
    shape = _shape(equation.outvars[0])
    along = {axis: bits for axis, bits in joined(operands).along.items()
             if axis < len(shape) and shape[axis] == len(bits)}
    return [Dependence(joined(operands).everywhere, along, frozenset(range(len(shape))))]


def _iota(equation: Any, operands: list[Dependence]) -> list[Dependence]:
    return [Dependence(varies=frozenset({equation.params["dimension"]}))]


MASKING = {"mul", "and", "select_n", "min", "max"}
ELEMENTWISE = MASKING | set(
    "abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil clamp complex conj "
    "convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge "
    "gt imag integer_pow is_finite le lgamma log log1p logistic lt ne neg nextafter not or "
    "population_count pow random_fold_in real reduce_precision rem round rsqrt shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan "
    "tanh xor".split()
)
Rule = Callable[[Any, list[Dependence]], list[Dependence]]
RULES: dict[str, Rule] = dict.fromkeys(ELEMENTWISE, _elementwise) | {
    "broadcast_in_dim": _broadcast, "transpose": _transpose, "reshape": _reshape,
    "squeeze": _squeeze, "slice": _cut(_sliced), "pad": _cut(_padded), "rev": _cut(_reversed),
    "concatenate": _concatenate, "dot_general": _dot, "conv_general_dilated": _convolution,
    "iota": _iota, "random_seed": unknown, "gather": _gather, "dynamic_slice": _dynamic_slice,
    **dict.fromkeys(["scatter", "scatter-add", "dynamic_update_slice"], _written),
    "sort": _per_line("dimension"), "split": _split, "stack": _stack,
    "optimization_barrier": lambda equation, operands: operands,
    "dot_product_attention_fwd_wrapper": _attention,
    **dict.fromkeys(["cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"], _per_line("axis")),
    **dict.fromkeys(["random_wrap", "random_unwrap", "random_bits", "random_split",
                     "bitcast_convert_type"], _leading),
    **{f"reduce_{kind}": _reduce for kind in ("sum", "max", "min", "prod", "and", "or", "xor")},
    "argmax": _reduce, "argmin": _reduce,
    **{f"reduce_window{kind}": _window for kind in ("", "_sum", "_max", "_min")},
    "platform_index": lambda equation, _: [Dependence()],
}
