"""The noise scale of a gradient: without bias, and averaged as a run does."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bigbatch import train
from bigbatch.job.devices import make_mesh
from bigbatch.models.normalization import GhostBatchNorm
from bigbatch.schedule.smoothing import Smoothed
from bigbatch.storage.logs import read_events
from bigbatch.update import network, noise, update
from bigbatch.watching.clock import Clock
from bigbatch.watching.log import Log
from tests.support import quadratic, small_config
from tests.support.updates import with_model

DRAWS, FEATURES = 10_000, 3


@pytest.mark.parametrize("weights", [np.ones(10), np.array([1, 3, 1, 2, 1, 1, 0.5, 2, 1, 1])])
def test_both_parts_are_those_of_a_linear_regression(weights):
    """Within 3 standard errors, over groups of 1, 4, 0, 3 and 2 examples.

    With x ~ N(0, I) and y = x w* + e the gradient of an example is x (x d - e), where d = w - w*.
    Its mean is d, and the trace of its covariance D (|d|^2 + var e) + |d|^2.
    """
    jax.config.update("jax_enable_x64", True)
    distance, deviation = jnp.array([0.3, -0.2, 0.1]), 0.7
    group_B = np.repeat([0, 1, 3, 4], [1, 4, 3, 2])

    def one_draw(key):
        inputs_key, noise_key = jax.random.split(key)
        x_BxD = jax.random.normal(inputs_key, (10, FEATURES))
        errors_B = deviation * jax.random.normal(noise_key, (10,))
        slopes_BxD = weights[:, None] * x_BxD * (x_BxD @ distance - errors_B)[:, None]
        each = [noise.one_group({"w": (slopes_BxD * (group_B == group)[:, None]).sum(axis=0)},
                                jnp.sum(weights * (group_B == group))) for group in range(5)]
        groups = jax.tree.map(lambda *leaves: sum(leaves), *each)
        assert groups.squares.shape == ()
        square = noise.squared_norm([slopes_BxD.sum(axis=0)])
        parts = noise.estimate(square, jnp.sum(weights), jnp.asarray(10.0), groups)
        return jnp.array([*parts, groups.count])

    found = np.asarray(jax.jit(jax.vmap(one_draw))(jax.random.split(jax.random.key(0), DRAWS)))
    square = float(distance @ distance)
    trace = FEATURES * (square + deviation**2) + square
    # n times the variance of the mean: of unequal weights it is more than an example's.
    trace *= 10 * np.sum(weights**2) / np.sum(weights) ** 2
    errors = found[:, :2].std(axis=0) / math.sqrt(DRAWS)
    assert np.all(np.abs(found[:, :2].mean(axis=0) - (square, trace)) < 3 * errors)
    assert np.all(errors < 0.02 * trace) and np.all(found[:, 2] == 4)


def test_one_group_has_no_other_to_be_compared_with():
    group = noise.one_group({"w": jnp.array([0.1, 0.3])}, jnp.asarray(0.7))
    empty = noise.one_group({"w": jnp.zeros(2)}, jnp.asarray(0.0))
    both = jax.tree.map(jnp.add, group, empty)
    parts = noise.estimate(jnp.asarray(0.1), jnp.asarray(0.7), jnp.asarray(2.0), both)
    assert np.isnan(parts.gradient_square) and np.isnan(parts.trace)
    assert Smoothed(1.0, 2.0, 0.5).after(parts, 1, 10.0) == pytest.approx(
        [value * math.exp(-0.1) for value in (1.0, 2.0, 0.5)])


def test_an_average_is_over_examples_and_its_parts_are_divided_last():
    """Two updates of 50 weigh as one of 100, and what is below 0 counts before the division."""
    parts = [noise.Parts(2.0, 30.0), noise.Parts(-1.0, 50.0)]
    small, large = Smoothed(), Smoothed()
    for part in parts:
        small = small.after(part, 50, 400.0).after(part, 50, 400.0)
        large = large.after(part, 100, 400.0)
    assert small == pytest.approx(large)
    first, second = math.exp(-0.25) * (1 - math.exp(-0.25)), 1 - math.exp(-0.25)
    assert large.scale == pytest.approx(
        (30 * first + 50 * second) / (2 * first - second))
    assert large.weight == pytest.approx(1 - math.exp(-0.5))
    assert Smoothed().after(parts[1], 10, 10.0).scale is None and Smoothed().scale is None


# --- runs ----------------------------------------------------------------------------------------
def test_a_measurement_between_two_updates_changes_nothing(tmp_path):
    """The same bits, and the same lines besides those that it adds; nor do groups in updates."""
    states, lines, groups = [], [], []
    for every in (0.0, 0.6):
        config = small_config.get_config(f"resident,noise.every_epochs={every},noise.ghosts=3")
        states.append(jax.device_get(
            train.train_and_evaluate(config, tmp_path / str(every), show=False)))
        lines.append(read_events(tmp_path / str(every) / "metrics.jsonl"))
        timing = read_events(tmp_path / str(every) / "timing.jsonl")
        groups.append({event["groups"] for event in timing if event["event"] == "noise"})
    assert groups == [set(), {6}]
    jax.tree.map(np.testing.assert_array_equal, *states)
    plain, measuring = lines
    added = {key for line in measuring for key in line} - {key for line in plain for key in line}
    assert {key.rpartition("_")[0] for key in added} >= {"noise_full", "noise_norms"}
    at = {line["updates"] for line in plain}
    assert plain == [{key: value for key, value in line.items() if key not in added}
                     for line in measuring if line["updates"] in at]
    assert [line["examples_seen"] for line in measuring if "noise_full" in line] == [
        96, 192, 288, 432, 528]  # at or after multiples of 96 examples, and at the end


def test_groups_are_measured_where_the_norms_tell_nothing_or_where_asked():
    for get_config, asked, measured in (
            (small_config.get_config, None, False), (small_config.get_config, True, True),
            (quadratic.get_config, None, True), (quadratic.get_config, False, False)):
        config = get_config()
        config.noise.by_groups = asked
        sums = update.abstract_sums(config, network.build(config), make_mesh(jax.devices()[:2]))
        assert (sums.groups is not None) == measured
        assert (sums.copies is not None) == (get_config is small_config.get_config)


def test_a_batch_far_beyond_the_measured_scale_is_warned_of_once_a_phase():
    told, written = [], []
    display = SimpleNamespace(line=told.append)
    log = Log(lambda kind, event: written.append(event), display, Clock(None, 0), 100)
    for phase, batch, scale, weight in (
            ("a", 64, 20.0, 0.4), ("a", 64, 40.0, 0.9), ("a", 64, None, 0.9), ("a", 64, 20.0, 0.9),
            ("a", 64, 10.0, 0.9), ("b", 128, 20.0, 0.9)):
        log.warn_of_noise({"phase": phase, "batch_size": batch, "noise_measured": scale,
                           "examples_seen": len(told)}, weight)
    assert [text.partition(":")[0] for text in told] == [
        f"the batch of {batch} is over 2 times the measured noise scale, 20 examples"
        for batch in (64, 128)]
    assert [event["event"] for event in written] == ["notice"] * 2


class ReadsItsScale(nnx.Module):
    """Uses a norm's scale in another place too."""

    def __init__(self, num_classes, dtype, rngs, *, elsewhere):
        self.norm = GhostBatchNorm(64, ghost_size=16, rngs=rngs)
        self.head = nnx.Linear(64, num_classes, rngs=rngs)
        self.elsewhere = elsewhere

    def __call__(self, images, train, keys):
        x = self.norm(images.reshape(len(images), 64), train)
        return self.head(x * self.norm.scale[...] if self.elsewhere else x)


@pytest.mark.parametrize(("elsewhere", "examples"), [(False, 16), (True, 0)])
def test_a_scale_that_is_read_outside_of_its_layer_gets_no_copies(elsewhere, examples):
    net = network.build(with_model(
        "update.test_noise.ReadsItsScale", {"elsewhere": elsewhere}))
    assert net.copied_for == examples
    assert net.copied["norm"] == {"scale": not elsewhere, "bias": not elsewhere}
    assert net.copied["head"] == {"kernel": False, "bias": False}
