"""What is compiled: collectives, donated buffers, inputs that compile nothing anew, types."""

import re

import jax
import numpy as np
import pytest

from bigbatch.job.devices import cut, place
from bigbatch.planning.compiled import collectives
from bigbatch.programs.compilation import Kind
from bigbatch.programs.lowering import lower_update
from tests.support import small_language
from tests.support.configs import tiny
from tests.support.updates import (
    NO_AUGMENTATION,
    conv_net,
    distance,
    inputs,
    prepare,
    train,
    training_set,
    with_model,
)


def lowered(updater, slots=1):
    """The programs of an update, and of a measurement, over all of the updater's devices."""
    batch = {"examples": jax.ShapeDtypeStruct(
        (updater.mesh.size * slots * updater.config.ghost_size, 4), np.int32,
        sharding=cut(updater.mesh))}
    resident = training_set(updater)
    return {
        kind.value: lower_update(
            updater.functions, kind, updater.mesh, updater.state, resident, batch)
        for kind in (Kind.UPDATE, Kind.ACCUMULATE, Kind.APPLY, Kind.MEASURE)
    }


@pytest.mark.parametrize(("make", "compiled"), [
    (lambda: tiny("noise.by_groups=true", *NO_AUGMENTATION),
     ("update", "accumulate", "apply", "measure")),
    # Of a transformer one program is enough: the others are counted before they are compiled.
    (lambda: small_language.get_config("small"), ("update",)),
])
def test_an_update_on_eight_devices_holds_one_reduction(make, compiled):
    programs = lowered(prepare(make(), 8))
    for name in compiled:
        found = collectives(programs[name].compile().as_text())
        counts = {kind: count for kind, (count, _) in found.items()}
        assert counts == ({} if name == "accumulate" else {"all-reduce": 1}), name
    # One before XLA merges any: it merges 256 arrays at most, and a network may have a thousand.
    counts = {name: program.as_text().count("stablehlo.all_reduce")
              for name, program in programs.items()}
    assert counts == {"update": 1, "accumulate": 0, "apply": 1, "measure": 1}


def test_buffers_are_donated():
    """State, with an average of its weights, and sums are written over and not copied."""
    updater = prepare(conv_net("microbatches=2", "ema=0.9", *NO_AUGMENTATION), 2)
    resident, state = training_set(updater), updater.state
    _, batches = inputs(updater, 96)
    sums = jax.tree.map(
        lambda leaf: place(np.zeros(leaf.shape, leaf.dtype), cut(updater.mesh)),
        updater.functions.sums,
    )
    arrays = {"update": state, "accumulate": sums, "apply": state}
    programs = {name: program.compile() for name, program in lowered(updater, 2).items()
                if name in arrays}
    for name, program in programs.items():
        # In the first line: "input_output_alias={ {0}: (0, {}, may-alias), ...".
        aliases = program.as_text().split("\n")[0].count("-alias)")
        assert aliases == len(jax.tree.leaves(arrays[name])), f"{name} writes {aliases} arrays over"

    def gone(tree):
        return {leaf.is_deleted() for leaf in jax.tree.leaves(tree)}

    rates = updater.rates(0.1, 0.9)
    added, _ = programs["accumulate"](state, sums, resident, batches[0], np.bool_(True))
    assert (gone(sums), gone(state)) == ({True}, {False})
    new, _ = programs["apply"](state, added, rates)
    assert (gone(state), gone(added)) == ({True}, {False})  # the sums serve the next update too
    newer, _ = programs["update"](new, resident, batches[0], rates)
    assert (gone(new), gone(resident), gone(newer)) == ({True}, {False}, {False})


def test_rate_and_momentum_compile_nothing_anew():
    updater = prepare(with_model("support.foreign_models.Regression", {}))
    resident, state = training_set(updater), updater.state
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None)
    counts = []
    for rate, momentum in ((0.1, 0.9), (0.2, 0.9), (0.2, 0.98)):
        _, batches = inputs(updater, 48)
        state, _ = updater.take(state, resident, batches, rate, momentum)
        counts.append(len(compiled))
    assert counts[0] > 0 and counts[0] == counts[1] == counts[2]


def floats(program):
    """The floating point types a program computes with."""
    return set(re.findall(r"\b(f16|bf16|f32|f64)\b", program.as_text().replace("x", " ")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_types_of_what_is_kept_and_of_what_is_computed(dtype):
    wide = "float64" if dtype == "float64" else "float32"
    updater = prepare(tiny(f"dtype={dtype}", "optimizer.name=adam"))
    programs = lowered(updater)
    # In float64 nothing falls to float32 on the way.
    expected = {"float32": {"f32"}, "bfloat16": {"bf16", "f32"}, "float64": {"f64"}}[dtype]
    assert floats(programs["update"]) == floats(programs["accumulate"]) == expected
    convolutions = re.findall(r"stablehlo.convolution.*-> tensor<[\dx]*x(\w+)>",
                              programs["update"].as_text())
    assert set(convolutions) == {{"bfloat16": "bf16", "float64": "f64"}.get(dtype, "f32")}
    # What is kept, and what devices send each other.
    for name in ("update", "accumulate", "apply"):
        for leaf in jax.tree.leaves(programs[name].out_info):
            assert leaf.dtype in (wide, np.int32, np.bool_), name
    state = updater.state
    logits, rows = jax.eval_shape(
        lambda *arrays: updater.net.apply(*arrays, True, None), state.params, state.batch_stats,
        jax.ShapeDtypeStruct((16, 8, 8, 1), dtype),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((logits, rows))} == {np.dtype(wide)}


def test_bfloat16_computes_nearly_the_same_step():
    steps, losses = {}, {}
    for dtype in ("float32", "bfloat16"):
        config = conv_net(f"dtype={dtype}", *NO_AUGMENTATION)
        before = jax.device_get(prepare(config).state.params)
        (state,), measured = train(config, 2, 1)
        losses[dtype] = measured[0].loss
        steps[dtype] = jax.tree.map(np.subtract, state.params, before)
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
    assert 1e-4 < distance(steps["bfloat16"], steps["float32"]) < 0.2


def test_ynnpack_takes_sums_and_no_products_on_cpu():
    """Sums it takes several times sooner than XLA's own code, products and convolutions later."""
    text = lowered(prepare(tiny(), 1))["update"].compile().as_text()
    assert " convolution(" in text
    taken = re.findall(r"(?m)^ *(?:ROOT )?%ynn_fusion[.\d]* = .*op_name=\"[^\"]*/(\w+)\"", text)
    assert set(taken) == {"reduce_sum"}
