"""Programs compiled ahead of need: in the background, each once it is lowered, in order."""

import gc
import threading
from functools import partial

import jax
import numpy as np
import pytest

from bigbatch import schedule, train
from bigbatch.job.devices import make_mesh
from bigbatch.programs import compilation
from bigbatch.programs.compilation import APPLY, EVALUATE, INIT, Kind, Program
from bigbatch.schedule.layout import make_layout
from bigbatch.schedule.rates import Rates
from bigbatch.update import update
from bigbatch.update.network import build
from tests.storage.test_continuing import assert_same_bits
from tests.support import small_config
from tests.support.updates import conv_net


def lower(key):
    return jax.jit(lambda x: x + key[1]).lower(np.float32(0))


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "compile"]


def finished(before):
    for thread in set(threads()) - set(before):
        thread.join(60)
        if thread.is_alive():
            return False
    return True


def test_a_program_compiles_while_the_next_is_lowered():
    started = threading.Event()

    class First:
        """The program of key 0, which says when its turn has come."""

        def compile(self):
            started.set()
            return lower(("add", 0)).compile()

    def lower_next(key):
        if key[1] == 0:
            return First()
        assert started.wait(60), "the first program waits until the second one is lowered"
        return lower(key)

    before = threads()
    keys = [("add", 0), ("add", 1)]
    futures = compilation.compile_ahead(lower_next, keys)
    assert [float(futures[key].result(60).call(np.float32(5))) for key in keys] == [5.0, 6.0]
    assert finished(before), "the thread goes on waiting when there is nothing left to compile"


def test_what_the_compiler_raises_is_told_where_it_is_waited_for():
    class Broken:
        def compile(self):
            raise RuntimeError("out of memory")

    futures = compilation.compile_ahead(
        lambda key: lower(key) if key[1] else Broken(), [("add", 0), ("add", 1)])
    with pytest.raises(RuntimeError, match="out of memory"):
        futures[("add", 0)].result(60)
    assert float(futures[("add", 1)].result(60).call(np.float32(5))) == 6.0


def test_a_stop_while_lowering_ends_the_thread():
    class Stop(Exception):
        pass

    asked, before = [], threads()

    def stop_at_the_second():
        asked.append(None)
        if len(asked) == 2:
            raise Stop

    with pytest.raises(Stop):
        compilation.compile_ahead(
            lower, [("add", 0), ("add", 1)], before_each=stop_at_the_second)
    assert finished(before), "the thread waits for programs that will not come"


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_as_before_once_all_is_lowered(enabled):
    found = []

    def lower_and_look(key):
        found.append(gc.isenabled())
        return lower(key)

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        compilation.compile_ahead(lower_and_look, [("add", 0), ("add", 1)])
        assert (found, gc.isenabled()) == ([False, False], enabled)
    finally:
        (gc.enable if before else gc.disable)()


def test_the_order_is_that_of_need_with_the_largest_pass_among_the_first():
    layouts = [make_layout(ghosts * 8, 8, 1, 16 * 8, 0) for ghosts in (1, 2, 16, 64)]
    assert [(layout.slots, layout.microbatches) for layout in layouts] == [
        (1, 1), (2, 1), (16, 1), (16, 4)]
    one, several = partial(Program, Kind.UPDATE), Program(Kind.ACCUMULATE, 16)
    first, later = compilation.compile_order(layouts, begins=True)
    assert first == [INIT, one(1), EVALUATE, one(16)]
    assert later == [one(2), several, APPLY]
    assert compilation.compile_order(layouts[2:]) == (
        [one(16), EVALUATE], [several, APPLY])
    assert compilation.compile_order([]) == ([EVALUATE], [])


def test_a_run_that_is_continued_draws_no_parameters(tmp_path, monkeypatch):
    config = small_config.get_config("resident")
    whole = train.train_and_evaluate(config, tmp_path / "whole", show=False)
    with pytest.raises(train.StoppedAfterPhase):
        train.train_and_evaluate(config, tmp_path / "run", stop_after_phase="0", show=False)
    monkeypatch.setattr(update, "make_init", None)
    assert_same_bits(train.train_and_evaluate(config, tmp_path / "run", show=False), whole, "run")


def test_rates_that_are_others_at_every_update_ask_for_no_further_program(tmp_path, monkeypatch):
    """Adam with decoupled decay and an average of weights: all are of use but Nesterov's."""
    config = small_config.get_config(
        "resident,optimizer.name=adam,optimizer.decoupled=true,optimizer.weight_decay=0.1,ema=0.9")
    compiled, compile_it = [], jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered, *rest: (
        compiled.append(lowered) or compile_it(lowered, *rest)))
    states, numbers, plain = [], [], schedule.take_rates

    def varied(field, *where):
        rates = plain(*where)
        share = 1 - 1e-5 * where[-1]  # falls with the examples seen
        return rates._replace(**{field: getattr(rates, field) * share})

    for field in (None, *(field for field in Rates._fields if field != "look_ahead")):
        if field:
            monkeypatch.setattr(schedule, "take_rates", partial(varied, field))
        compiled.clear()
        states.append(train.train_and_evaluate(config, tmp_path / str(field), show=False))
        numbers.append(len(compiled))
    assert numbers[0] >= 4 and set(numbers) == {numbers[0]}
    plain_leaf, *leaves = [
        np.asarray(jax.tree.leaves(state.average["params"])[0]).tobytes() for state in states]
    assert plain_leaf not in leaves and len(set(leaves)) == len(leaves)


def test_the_state_has_the_shapes_that_programs_are_lowered_for():
    """The mesh's shapes are told without drawing anything; so nothing may be drawn otherwise."""
    for settings in ((), ("optimizer.name=adam",), ("optimizer.name=sgd",), ("ema=0.9",)):
        config = conv_net(*settings)
        net = build(config)
        told = update.abstract_state(config, net, make_mesh())
        drawn = update.init_state(config, net)
        assert jax.tree.structure(told) == jax.tree.structure(drawn)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), told) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), drawn)
