"""What updates and evaluations are fed: the same examples in the same slots, resident or streamed.

Most tests read a small TFDS data set of PNG images, which every decoder turns into the same pixels.
"""

import io
import itertools
import os
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from PIL import Image

from bigbatch.config import base_config, make_phases
from bigbatch.data import feed
from bigbatch.job.devices import AXIS, make_mesh
from bigbatch.mistake import Mistake
from bigbatch.schedule import order
from bigbatch.schedule.layout import make_layout
from bigbatch.schedule.rates import Rates
from bigbatch.tasks import contract
from bigbatch.update import evaluation, network, update
from tests.data.test_sources import prepare
from tests.support.sample_data import data_dir

EXAMPLES, TEST_EXAMPLES, GHOST, SIDE = 50, 21, 4, 8


@cache
def pictures() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (EXAMPLES, SIDE, SIDE, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A TFDS data_dir with the pictures, picture i labelled i % 10."""
    path = tmp_path_factory.mktemp("data")
    prepare(path, [encoded(pixels) for pixels in pictures()], channels=3)
    return str(path)


def make_config(folder: str, streaming: bool, **data):
    """Two epochs of 50 pictures: three updates of 12, two of 24, one of 48."""
    config = base_config()
    config.seed = 5
    config.ghost_size = GHOST
    config.recipe.update({"batch_size": 12, "epochs": 2.0, "falls": ((0.7, 2.0), (1.3, 2.0))})
    config.limits.max_batch_size = 48
    config.eval_batch_size = 4
    config.network, config.model = "tests.data.test_feed.Linear", {}
    config.data.update({
        "name": "cifar10", "dir": folder, "streaming": streaming, "train_examples": EXAMPLES,
        "test_examples": TEST_EXAMPLES, "test_split": f"test[:{TEST_EXAMPLES}]",
        "image_size": SIDE, "mean": (120.0,) * 3, "std": (60.0,) * 3, "crop_style": "none",
        "eval_share": 1.0, "resample": "bicubic", "on_bad_image": "stop", "workers": 0,
        "read_threads": 2, **data,
    })
    return config


class Linear(nnx.Module):
    """The smallest network there is."""

    def __init__(self, num_classes, dtype, rngs):
        self.dense = nnx.Linear(SIDE * SIDE * 3, num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, images, train, keys):
        return self.dense(images.reshape(len(images), -1))


def updates(phases, examples_seen=0):
    """(phase, examples seen before) of every update from `examples_seen` on."""
    return [
        (phase, start) for phase in phases
        for start in range(phase.start_example, phase.end_example, phase.batch_size)
        if start >= examples_seen
    ]


class Run:
    """A run's phases, how they are dealt, and its feed."""

    def __init__(self, config, devices=1, microbatches=0, examples_seen=0, evaluated_at=(),
                 mesh=None):
        self.config, self.mesh = config, mesh or make_mesh(jax.devices()[:devices])
        self.phases = [
            phase for phase in make_phases(config) if phase.end_example > examples_seen]
        self.layouts = [
            make_layout(phase.batch_size, GHOST, self.mesh.size, 1024, microbatches)
            for phase in self.phases]
        self.updates = updates(self.phases, examples_seen)
        task = contract.task_of(config)
        self.fields = contract.fields_of(config, task)
        self.feed = feed.open_feed(
            config, self.fields, contract.load(config, task), self.mesh, self.phases, self.layouts,
            examples_seen, evaluated_at)

    def layout_of(self, phase):
        return self.layouts[self.phases.index(phase)]

    def microbatches(self, phase, start):
        return self.feed.update(phase, self.layout_of(phase), start)

    def source(self, batch):
        """The images and labels of a microbatch, on the host, wherever they come from."""
        if "images" in batch:
            return np.asarray(batch["images"]), np.asarray(batch["labels"])
        record = np.asarray(batch["examples"][:, 0])
        resident = self.feed.resident
        return tuple(np.asarray(resident[name].take(record)) for name in ("images", "labels"))


def in_dealt_order(arrays, devices: int) -> np.ndarray:
    """Rows of an update's microbatches, device by device and pass by pass: the batch's order."""
    parts = np.stack([np.asarray(a).reshape(devices, -1, *a.shape[1:]) for a in arrays], axis=1)
    return parts.reshape(-1, *parts.shape[3:])


def check_fits(batch, shapes):
    """A program that is compiled for `shapes` takes `batch`, and moves no images for it."""
    assert batch.keys() == shapes.keys()
    for name, array in batch.items():
        assert (array.shape, array.dtype) == (shapes[name].shape, shapes[name].dtype), name
        if isinstance(array, jax.Array):
            assert array.sharding == shapes[name].sharding, name
        else:
            assert name == "examples"


# Updates.


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("devices, microbatches", [*itertools.product((1, 3, 8), (1, 2))])
def test_every_update_holds_the_runs_next_examples_in_their_slots(
    folder, devices, microbatches, streaming
):
    """Across two changes of batch size and an epoch's end; 3, 6 and 12 ghost batches."""
    run = Run(make_config(folder, streaming), devices, microbatches)
    assert [phase.batch_size for phase, _ in run.updates] == [12, 12, 12, 24, 24, 48]
    assert ("images" in run.feed.resident) != streaming
    idle = 0
    for phase, start in run.updates:
        batches = list(run.microbatches(phase, start))
        assert len(batches) == run.layout_of(phase).microbatches
        for batch in batches:
            check_fits(
                batch, feed.update_shapes(
                    run.config, run.fields, run.mesh, run.layout_of(phase).slots))
        rows = in_dealt_order([batch["examples"] for batch in batches], devices)
        images, labels = zip(*map(run.source, batches), strict=True)
        images, labels = in_dealt_order(images, devices), in_dealt_order(labels, devices)
        filled = rows[:, 3] >= 0
        expected = order.records(5, start, phase.batch_size, EXAMPLES)
        np.testing.assert_array_equal(rows[filled, :3], expected)
        ghosts = phase.batch_size // GHOST
        np.testing.assert_array_equal(rows[filled, 3], np.repeat(np.arange(ghosts)[::-1], GHOST))
        np.testing.assert_array_equal(images[filled], pictures()[expected[:, 0]])
        np.testing.assert_array_equal(labels[filled], expected[:, 0] % 10)
        idle += np.sum(~filled)
        if streaming:
            assert not images[~filled].any() and not labels[~filled].any()
            usable = in_dealt_order([batch["usable"] for batch in batches], devices)
            np.testing.assert_array_equal(usable, filled)
    assert idle or devices < 8, "no slot is left over"
    run.feed.close()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_begun_anywhere_is_fed_as_one_never_stopped(folder, streaming):
    def fed(examples_seen):
        ahead = [position for position in (36, 84) if position > examples_seen]
        run = Run(make_config(folder, streaming), 3, 2, examples_seen, ahead)
        batches = []
        for phase, start in run.updates:
            batches += [jax.tree.map(np.asarray, b) for b in run.microbatches(phase, start)]
            if start + phase.batch_size in ahead:
                list(run.feed.evaluation())
        run.feed.close()
        return batches

    whole = fed(0)
    starts = [start for _, start in updates(make_phases(make_config(folder, streaming)))]
    assert starts == [0, 12, 24, 36, 60, 84]
    for start in starts[1:]:
        rest = fed(start)
        jax.tree.map(np.testing.assert_array_equal, rest, whole[-len(rest):])


def test_an_update_of_streamed_pictures_is_that_of_resident_ones(folder):
    """The compiled programs themselves, with 6 ghost batches on 8 devices, cropped and flipped."""
    results = {}
    for streaming in (False, True):
        config = make_config(folder, streaming)
        config.data.augment.update({"pad": 2, "crop": SIDE, "flip": True})
        run = Run(config, 8, 1, examples_seen=36, evaluated_at=(60,))
        net = network.build(config)
        state = update.init_state(config, net)
        phase, start = run.updates[0]
        (batch,) = run.microbatches(phase, start)
        state, measured = update.make_update(config, net, run.mesh).update(
            state, run.feed.resident, batch,
            Rates(*map(np.float32, (0.1, 0.9, 0.999, 0.0, 0.0, 0.9))))
        program = evaluation.make_evaluate(config, net, run.mesh)
        sums = [program(state.params, state.batch_stats, run.feed.test, batch)
                for batch in run.feed.evaluation()]
        sums = jax.tree.map(lambda *of_one: np.sum(of_one), *sums)
        results[streaming] = state.params, measured, sums
        run.feed.close()
    assert results[True][2]["loss"][1] == TEST_EXAMPLES
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        results[False], results[True])


# Evaluation.


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("devices, batches", [(1, 6), (3, 2), (8, 1)])
def test_an_evaluation_holds_the_whole_test_set_in_order(folder, devices, batches, streaming):
    run = Run(make_config(folder, streaming), devices, evaluated_at=(0,))
    taken = list(run.feed.evaluation())
    assert len(taken) == batches
    for batch in taken:
        check_fits(batch, feed.evaluation_shapes(run.config, run.fields, run.mesh))
    record = np.concatenate([batch["record"] for batch in taken])
    np.testing.assert_array_equal(record[:TEST_EXAMPLES], np.arange(TEST_EXAMPLES))
    assert (record[TEST_EXAMPLES:] == -1).all()
    if streaming:
        images = np.concatenate([batch["images"] for batch in taken])[:TEST_EXAMPLES]
        labels = np.concatenate([batch["labels"] for batch in taken])[:TEST_EXAMPLES]
    else:
        images = run.feed.test["images"].take(np.arange(TEST_EXAMPLES))
        labels = run.feed.test["labels"].take(np.arange(TEST_EXAMPLES))
    np.testing.assert_array_equal(images, pictures()[:TEST_EXAMPLES])
    np.testing.assert_array_equal(labels, np.arange(TEST_EXAMPLES) % 10)
    run.feed.close()


def test_a_stream_is_not_taken_in_another_order_than_it_was_told(folder):
    run = Run(make_config(folder, True), evaluated_at=(12,))
    phase, start = run.updates[0]
    with pytest.raises(RuntimeError, match=r"is at \(True, 0\) and was asked for \(False, 0\)"):
        next(run.feed.evaluation())
    run.feed.close()
    run = Run(make_config(folder, True), evaluated_at=(12,))
    list(run.microbatches(phase, start))
    with pytest.raises(RuntimeError, match=r"is at \(False, 0\) and was asked for \(True, 12\)"):
        next(run.microbatches(*run.updates[1]))
    run.feed.close()


# Images that cannot be decoded.


def test_a_skipped_picture_is_an_empty_slot_and_counted(tmp_path):
    images = [encoded(pixels) for pixels in pictures()]
    images[7] = images[7][:60]
    prepare(tmp_path, images, channels=3)
    run = Run(make_config(str(tmp_path), True, on_bad_image="skip"), 3, evaluated_at=(0,))
    record = np.concatenate([batch["record"] for batch in run.feed.evaluation()])
    assert record[:TEST_EXAMPLES].tolist() == [
        record if record != 7 else -1 for record in range(TEST_EXAMPLES)]
    assert run.feed.skipped == 1
    usable = np.concatenate([
        np.asarray(batch["usable"]) for phase, start in run.updates
        for batch in run.microbatches(phase, start)])
    seen = order.records(5, 0, 132, EXAMPLES)[:, 0]
    assert np.sum(usable) == 132 - np.sum(seen == 7)
    assert run.feed.skipped == 1 + np.sum(seen == 7)
    run.feed.close()
    run = Run(make_config(str(tmp_path), True))
    with pytest.raises(ValueError, match="record 7 .*of split 'train': the image is truncated"):
        for phase, start in run.updates:
            list(run.microbatches(phase, start))
    run.feed.close()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_where_no_image_is_of_use_the_last_of_them_are_named(tmp_path, microbatches):
    images = [encoded(pixels)[:60] for pixels in pictures()]
    prepare(tmp_path, images, channels=3)
    config = make_config(str(tmp_path), True, on_bad_image="skip")
    run = Run(config, 1, microbatches, evaluated_at=(0,))
    net = network.build(config)
    state = update.init_state(config, net)
    with pytest.raises(Mistake, match="no example of the test set is of use: all were skipped.*"
                                      "record 20 of split 'test.*truncated"):
        evaluation.whole_test_set(
            config, evaluation.make_evaluate(config, net, run.mesh),
            evaluation.networks_of(state._asdict()), run.feed)
    taken = iter(run.microbatches(*run.updates[0]))
    for _ in range(microbatches - 1):
        next(taken)
    with pytest.raises(Mistake, match="no example of the update from example 0 is of use.*record"):
        next(taken)
    run.feed.close()


# What the devices hold.


def test_the_devices_hold_two_microbatches_of_images_at_most(folder):
    """Fed as in training, where one pass is under way when the next is asked for."""
    config = make_config(folder, True, image_size=19, eval_share=1.0)  # as in no other test
    run = Run(config, microbatches=2, evaluated_at=(36, 132))
    held, under_way = [], None
    for phase, start in run.updates:
        fed = run.microbatches(phase, start)
        if start + phase.batch_size in (36, 132):
            fed = itertools.chain(fed, run.feed.evaluation())
        for batch in fed:
            held.append(sum(array.shape[1:] == (19, 19, 3) for array in jax.live_arrays()))
            under_way = batch
    assert "record" in under_way
    assert held == [1] + [2] * (6 * 2 + 2 * 6 - 1)
    run.feed.close()


# Real images.


def test_cifar10_is_the_same_streamed_and_resident():
    folder = data_dir("cifar10")
    splits = {"train_split": f"train[:{EXAMPLES}]", "image_size": 32, "eval_share": 1.0}
    taken = {}
    for streaming in (False, True):
        run = Run(make_config(folder, streaming, **splits), 3, 2)
        batches = [batch for phase, start in run.updates
                   for batch in run.microbatches(phase, start)]
        filled = np.concatenate([batch["examples"][:, 3] for batch in batches]) >= 0
        images, labels = zip(*map(run.source, batches), strict=True)
        taken[streaming] = np.concatenate(images)[filled], np.concatenate(labels)[filled]
        run.feed.close()
    np.testing.assert_array_equal(taken[True][1], taken[False][1])
    # Two decoders of JPEG may round the last bit differently.
    difference = np.abs(taken[True][0].astype(int) - taken[False][0])
    assert difference.mean() < 0.5 and difference.max() < 16


def test_a_photograph_has_the_same_crop_on_any_devices_and_passes():
    folder = data_dir("imagenet2012")
    settings = {
        "name": "imagenet2012", "train_split": f"train[:{EXAMPLES}]", "num_classes": 1000,
        "test_split": f"validation[:{TEST_EXAMPLES}]", "image_size": 32, "eval_share": 32 / 36,
        "crop_style": "goyal",
    }
    taken = []
    for devices, microbatches in ((1, 1), (3, 2), (8, 1)):
        run = Run(make_config(folder, True, **settings), devices, microbatches)
        images = []
        for phase, start in run.updates:
            batches = list(run.microbatches(phase, start))
            rows = in_dealt_order([batch["examples"] for batch in batches], devices)
            some = in_dealt_order([batch["images"] for batch in batches], devices)
            images.append(some[rows[:, 3] >= 0])
        taken.append(np.concatenate(images))
        run.feed.close()
    assert taken[0].std() > 20
    np.testing.assert_array_equal(taken[1], taken[0])
    np.testing.assert_array_equal(taken[2], taken[0])


# Several processes.


SCRIPT = """
import sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
from tests.data.test_feed import Run, interleaved_mesh, make_config

mesh = interleaved_mesh()
found = {}
for streaming in (False, True):
    run = Run(make_config(sys.argv[1], streaming), microbatches=2, evaluated_at=(12,), mesh=mesh)
    batches = list(run.microbatches(*run.updates[0])) + list(run.feed.evaluation())
    run.feed.close()
    for number, batch in enumerate(batches):
        for name, array in batch.items():
            for shard in array.addressable_shards:
                at = mesh.devices.tolist().index(shard.device)
                found[f"{streaming}/{number}/{name}/{at}"] = np.asarray(shard.data)
np.savez(sys.argv[4], **found)
"""


def interleaved_mesh() -> Mesh:
    """Of all devices, such that two processes' take turns."""
    processes = [jax.local_devices(process) for process in range(jax.process_count())]
    return Mesh(np.array(processes).T.reshape(-1), (AXIS,))


def test_each_of_two_processes_feeds_its_own_devices_wherever_they_stand(folder, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu",
                   "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, folder, address, str(number),
             str(tmp_path / f"{number}.npz")],
            env=environment, cwd=root, stderr=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    own = [dict(np.load(tmp_path / f"{number}.npz")) for number in range(2)]
    places = [sorted({int(key.rpartition("/")[2]) for key in found}) for found in own]
    assert places == [[0, 2], [1, 3]]
    found = own[0] | own[1]
    for streaming in (False, True):
        run = Run(make_config(folder, streaming), 4, 2, evaluated_at=(12,))
        batches = [*run.microbatches(*run.updates[0]), *run.feed.evaluation()]
        run.feed.close()
        for number, batch in enumerate(batches):
            for name, array in batch.items():
                there = [found.pop(f"{streaming}/{number}/{name}/{at}") for at in range(4)]
                np.testing.assert_array_equal(np.concatenate(there), array, err_msg=name)
    assert not found
