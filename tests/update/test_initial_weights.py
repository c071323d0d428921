"""A run that begins with the weights of another, from its workdir or from an exported file."""

import jax
import numpy as np
import pytest

from bigbatch import checkpoint, train
from bigbatch.config import saved_config
from bigbatch.export import export_run
from bigbatch.job.devices import make_mesh
from bigbatch.mistake import Mistake
from bigbatch.storage.logs import read_events
from bigbatch.update import initial_weights, network
from bigbatch.update.update import abstract_state, init_state
from tests.support.updates import conv_net


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A run of one seed, and its export."""
    folder = tmp_path_factory.mktemp("before")
    config = conv_net("recipe.epochs=2.0", "recipe.falls=()", "seed=5")
    train.train_and_evaluate(config, folder / "run", show=False)
    export_run(folder / "run", "npz", folder / "net.npz")
    return folder


def read(config):
    """Of a new run on one device."""
    mesh = make_mesh(jax.devices()[:1])
    return initial_weights.read(config, abstract_state(config, network.build(config), mesh))


@pytest.mark.parametrize("name", ["run", "net.npz"])
def test_a_run_begins_with_them_and_goes_on_without(before, name, tmp_path):
    config = conv_net("recipe.epochs=0.5", "recipe.falls=()", f"init_from={before / name}")
    arrays = read(config)
    saved = checkpoint.load(before / "run")
    expected = initial_weights.names({key: saved[key] for key in ("params", "batch_stats")})
    assert arrays.keys() == expected.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(array, expected[key])
    train.train_and_evaluate(config, tmp_path / "run", show=False)
    first = read_events(tmp_path / "run" / "metrics.jsonl")[0]
    last = read_events(before / "run" / "metrics.jsonl")[-1]
    assert first["train_loss"] < 1.3 * last["train_loss"] < 1.7 and first["epoch"] < 0.2
    with config.unlocked():
        config.init_from = ""
    with pytest.raises(Mistake, match="init_from: '.*' saved, '' now"):
        train.train_and_evaluate(config, tmp_path / "run", show=False)


@pytest.mark.parametrize("name", ["run", "net.npz"])
def test_a_named_layer_begins_anew(before, name):
    """And an average of the weights begins with them, in arrays of its own."""
    config = conv_net(
        f"init_from={before / name}", "init_anew=('head','norm2')", "seed=3", "ema=0.9")
    drawn = jax.tree.map(np.asarray, init_state(config, network.build(config)))
    state = initial_weights.put(drawn, read(config))
    saved = checkpoint.load(before / "run")
    for layer in ("head", "norm2"):
        jax.tree.map(np.testing.assert_array_equal, state.params[layer], drawn.params[layer])
    np.testing.assert_array_equal(state.batch_stats["norm2"]["mean"], 0)
    jax.tree.map(np.testing.assert_array_equal, state.params["conv1"], saved["params"]["conv1"])
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, drawn.opt_state)
    for key, tree in state.average.items():
        jax.tree.map(np.testing.assert_array_equal, tree, getattr(state, key))
    kernels = [params["conv1"]["kernel"] for params in (state.params, state.average["params"])]
    assert not np.shares_memory(*map(np.asarray, kernels))


@pytest.mark.parametrize(("settings", "message"), [
    (("data.num_classes=12",), r"does not fit the network: params/head/bias has the shape \(10,\), "
     r"in the network \(12,\); params/head/kernel .*config.init_anew=\('head',\)\.$"),
    (("init_anew=('tail',)",), "names tail, which the network has not; it has conv1, conv2, head"),
    (("init_from=/no/such.npz",), "/no/such.npz, which cannot be read: No such file"),
    (("init_from=/no/such/run",), "config.init_from: /no/such/run has no checkpoint"),
    (("init_from=", "init_anew=('head',)"), "init_anew is .*, but config.init_from is empty"),
])
def test_what_does_not_fit_is_listed(before, settings, message):
    config = conv_net(f"init_from={before / 'run'}", *settings)
    with pytest.raises(Mistake, match=message) as told:
        read(config)
    assert "\n" not in str(told.value)


def test_an_array_too_much_or_too_few_is_a_misfit_and_a_long_list_is_cut(before, tmp_path):
    with np.load(before / "net.npz") as file:
        arrays = {name: file[name] for name in file.files if "conv" not in name}
    np.savez(tmp_path / "other.npz", **arrays, **{"params/tail/kernel": np.zeros(3)})
    config = conv_net(f"init_from={tmp_path / 'other.npz'}")
    with pytest.raises(Mistake, match="params/conv1/bias is missing; .*the network has no "
                                      r"params/tail/kernel.*\('conv1','conv2','tail',\)"):
        read(config)


def test_an_older_run_began_with_what_its_seed_draws():
    config = saved_config({"config": {}})
    assert (config.init_from, config.init_anew) == ("", ())


@pytest.mark.parametrize("name", ["run", "net.npz"])
def test_a_host_that_reads_other_weights_than_the_first_says_so(before, name, monkeypatch):
    monkeypatch.setattr(initial_weights.processes, "decided_by_first",
                        lambda what, decide: "0a" if what == "init_from" else decide())
    config = conv_net(f"init_from={before / name}")
    with pytest.raises(Mistake, match="other weights here than on the job's first host"):
        read(config)
