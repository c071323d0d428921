"""The benchmarks: that what is compared is the same work, and that the command leaves a record."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigbatch import train
from bigbatch.models.resnet import ResNet
from bigbatch.update import network
from bigbatch.update.update import init_state
from experiments.speed import flax_resnet, language, measure, whole_runs
from experiments.speed.bare import BareUpdate
from experiments.speed.peers import with_flax_norm
from tests.models import test_transformer
from tests.support.configs import load, tiny
from tests.support.tables import rows_of
from tests.support.updates import NO_AUGMENTATION, conv_net, distance, inputs, prepare, training_set

REPOSITORY = Path(__file__).parents[2]


def test_rows_take_turns_and_ratios_are_of_the_same_repeat():
    taken = []
    seconds = measure.paired({name: lambda name=name: taken.append(name) for name in "ab"}, 3)
    assert "".join(taken) == "ab" + "ba" + "ab" + "ba"
    assert {name: len(row) for name, row in seconds.items()} == {"a": 3, "b": 3}
    assert measure.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    measured = measure.Measurement("a name", "a setting", "<= 1", "s", [3.0, 1.0, 8.0])
    assert measure.spread(measured) == "3 s (1 to 8)"


@pytest.mark.parametrize("settings", [(), ("microbatches=3",)])
def test_the_bare_update_is_a_runs_update(settings):
    """With augmentation and with several microbatches; its loss is the run's first."""
    config = conv_net(*settings)
    updater = prepare(config)
    _, batches = inputs(updater, config.recipe.batch_size)
    expected, measured = updater.take(
        updater.state, training_set(updater), batches, 0.01, config.recipe.momentum)
    bare = BareUpdate(config)
    bare.take()
    assert bare.loss == pytest.approx(float(measured.loss), rel=1e-6)
    assert distance(bare.state.params, expected.params) < 1e-6


def test_the_pytorch_network_is_the_same_function():
    """With the same weights in float64; a stride's padding on the wrong side would show here."""
    torch = pytest.importorskip("torch")
    from experiments.speed import torch_wide_resnet

    jax.config.update("jax_enable_x64", True)
    config = load("cifar10", "increase,dtype=float64,ghost_size=4,model.width=1")
    net = network.build(config)
    params, batch_stats, *_ = init_state(config, net)
    theirs = torch_wide_resnet.WideResNet(16, 1, 10).double()

    def copy(layer, values):
        for name, array in values.items():
            array = np.asarray(array)
            if name == "kernel":
                array = array.transpose((3, 2, 0, 1) if array.ndim == 4 else (1, 0))
            parameter = layer.bias if name == "bias" else layer.weight
            assert parameter.shape == array.shape
            parameter.data = torch.tensor(array)

    for name in ("conv", "norm", "head"):
        copy(getattr(theirs, name), params[name])
    for place, block in params["blocks"].items():
        for name, values in block.items():
            copy(getattr(theirs.blocks[place], name), values)
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3))
    ours, *_ = jax.jit(net.apply, static_argnums=3)(
        params, batch_stats, jnp.asarray(images), True, None)
    with torch.no_grad():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-10)


def test_the_pytorch_llama_is_the_same_function():
    torch = pytest.importorskip("torch")
    from experiments.speed import torch_llama

    jax.config.update("jax_enable_x64", True)
    run, params = test_transformer.of_parameters("float64")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        theirs = torch_llama.Llama(
            test_transformer.VOCABULARY, test_transformer.LENGTH, **test_transformer.SMALL)
    finally:
        torch.set_default_dtype(before)
    torch_llama.fill(theirs, params)
    with torch.no_grad():
        expected = theirs(torch.tensor(test_transformer.TOKENS).long()).numpy()
    np.testing.assert_allclose(jax.jit(run)(params), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_a_plain_step_and_pytorchs_learn_what_the_update_does():
    """The benchmark fails where the losses of two updates are not equal."""
    *plain, torchs = language.language(1, short=True)
    assert [len(row.values) for row in plain] == [1, 1]
    assert len(torchs.values) == (1 if torchs.seconds else 0)


def test_fixed_tensors_are_what_the_network_gets_unaugmented():
    config = conv_net(*NO_AUGMENTATION)
    fed, fixed = BareUpdate(config), BareUpdate(config, augmented=False)
    assert "images" not in fixed.resident and fixed.batches[0]["images"].dtype == jnp.float32
    fed.take()
    fixed.take()
    assert distance(fixed.state.params, fed.state.params) < 1e-6


def test_flaxs_batch_norm_gives_the_update_of_one_ghost_batch():
    config = tiny("ghost_size=48", "limits.granularity=48")
    ours, flaxs = BareUpdate(config), BareUpdate(config, with_flax_norm(config))
    flaxs.state = flaxs.state._replace(params=jax.tree.map(jnp.array, ours.state.params))
    ours.take()
    flaxs.take()
    assert flaxs.loss == pytest.approx(ours.loss, rel=1e-5)
    assert distance(flaxs.state.params, ours.state.params) < 1e-5


def test_flaxs_resnet_is_ours_parameter_for_parameter():
    """The same logits from the same parameters: depth 50, 1/16 of the width."""
    module = ResNet(10, jnp.float32, nnx.Rngs(0), ghost_size=4, width=4)
    graph, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(4, 32, 32, 3)), jnp.float32)
    flaxs = flax_resnet.ResNet(10, jnp.float32, width=4)
    variables = {"params": flax_resnet.from_ours(nnx.to_pure_dict(params)),
                 "batch_stats": flax_resnet.from_ours(nnx.to_pure_dict(stats))}
    # Blocks end with a scale of 0; with 1 they take part.
    for name, block in variables["params"].items():
        if name.startswith("block_"):
            block["norm_2"]["scale"] = jnp.ones_like(block["norm_2"]["scale"])
    for block in module.blocks:
        block.norms[2].scale.set_value(jnp.ones_like(block.norms[2].scale[...]))
    graph, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)
    compiled = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    ours = compiled(lambda params, stats: nnx.merge(graph, params, stats, copy=True)(
        images, True, None))(params, stats)
    theirs, _ = compiled(lambda variables: flaxs.apply(
        variables, images, mutable=["batch_stats"]))(variables)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(np.abs(ours).max()))
    whole = jax.eval_shape(flax_resnet.ResNet(1000, jnp.float32).init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(whole["params"])) == 25_557_032


def test_a_runs_updates_and_bare_ones_take_turns(monkeypatch):
    """Bare ones first and last; the run's own are all taken, with what they were given."""
    taken, ends = [], []

    class Bare:
        def take(self, updates):
            taken.append(f"bare {updates}")

    monkeypatch.setattr(
        train, "take_update", lambda calls, state, *rest: taken.append(rest) or (state, calls))
    take_update = whole_runs._taking_turns(Bare(), 2, ends)
    for number in range(5):
        assert take_update("calls", number, number) == (number, "calls")
    assert taken == ["bare 2", (0,), (1,), "bare 2", (2,), (3,), "bare 2", (4,)]
    assert len(ends) == 6 and ends == sorted(ends)
    # Bare turns of 1, 3 and 2 seconds, the run's of 4 and 5.
    run, bare = whole_runs._run_and_bare([0.0, 1.0, 5.0, 8.0, 13.0, 15.0])
    assert (run, bare) == (4 + 5, (1 + 3) / 2 + (3 + 2) / 2)


def test_the_command_prints_a_table_and_writes_a_record(tmp_path):
    output = tmp_path / "speed.json"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.speed.table", f"--output={output}", "--short",
         "--only=demo,dispatch", "--repeats=1"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    demo = record["measurements"][0]
    assert demo["benchmark"] == "demo" and record["versions"]["jax"] == jax.__version__
    assert len(demo["values"]) == len(demo["seconds"]["run"]) == 1
    for value, run, bare in zip(demo["values"], *demo["seconds"].values(), strict=True):
        assert value == pytest.approx(1.0 - bare / run, abs=2e-3)
    dispatch = record["measurements"][1]
    assert dispatch["benchmark"] == "dispatch"  # it fails where both do not reach the same loss
    assert dispatch["values"] == measure.ratios(*dispatch["seconds"].values())
    rows = rows_of(done.stdout)
    assert len(rows) == 1 + len(record["measurements"])
    names = measure.Measurement._fields
    said = measure.spread(measure.Measurement(**{name: demo[name] for name in names}))
    assert rows[1][1:4] == ["<= 0.05", said, "1"]


def test_a_mistake_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.speed.table",
         f"--output={tmp_path / 'speed.json'}", "--only=goodput,fastness"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "fastness unknown; allowed are goodput, demo" in done.stderr
    assert not list(tmp_path.iterdir())
