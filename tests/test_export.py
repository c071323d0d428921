"""A trained network outside of its run: called on images, and in files of three formats."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export as jax_export

from bigbatch import checkpoint, evaluate, train
from bigbatch.data import sources
from bigbatch.export import export_run
from bigbatch.mistake import Mistake
from bigbatch.models.normalization import GhostBatchNorm
from tests.support.started import end, start_python
from tests.support.updates import with_model

SETTINGS = ("recipe.epochs=0.5", "recipe.falls=()", "data.augment.pad=1", "data.augment.crop=7",
            "eval_batch_size=100")


class Own(nnx.Module):
    """A model that takes images of any size, and of which nothing else is asked."""

    def __init__(self, num_classes, dtype, rngs):
        self.conv = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.norm = GhostBatchNorm(8, ghost_size=16, rngs=rngs)
        self.head = nnx.Linear(8, num_classes, rngs=rngs)

    def __call__(self, images, train, keys):
        return self.head(nnx.relu(self.norm(self.conv(images), train)).mean(axis=(1, 2)))


class Counting(Own):
    """Asks for the number of images as a number of Python."""

    def __call__(self, images, train, keys):
        return super().__call__(images, train, keys).reshape(len(images), -1)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("own"), "Own")


def trained(folder, model, *settings):
    config = with_model(f"test_export.{model}", {}, *SETTINGS, *settings)
    config.data.image_size = 7
    train.train_and_evaluate(config, folder, show=False)
    return folder


@pytest.fixture(scope="module")
def test_set(workdir):
    return sources.load(checkpoint.load_model(workdir).config.data)


def test_five_lines_give_the_accuracy_that_evaluate_gives(workdir, test_set):
    model = checkpoint.load_model(workdir)
    logits = model(test_set.test_images)
    assert logits.shape == (360, 10) and logits.dtype == np.float32
    expected = evaluate.evaluate_run(workdir)
    assert np.mean(logits.argmax(axis=1) == test_set.test_labels) == expected["test_accuracy"]
    losses = -jax.nn.log_softmax(logits)[np.arange(360), test_set.test_labels]
    assert np.mean(losses) == pytest.approx(expected["test_loss"], rel=1e-5)


@pytest.mark.parametrize("number", [0, 1, 7])
def test_any_number_of_images(workdir, test_set, number):
    model = checkpoint.load_model(workdir)
    logits = model(test_set.test_images[:number])
    assert logits.shape == (number, 10)
    np.testing.assert_allclose(
        logits, model(test_set.test_images[:20])[:number], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("change", "message"), [
    (lambda images: images / 255, r"the images are float64; they must be uint8, .*itself"),
    (lambda images: images[0], r"shape \(8, 8, 1\); .* \(N, height, width, 1\) with sides of 7 or"),
    (lambda images: images[0], r"also for one image: images\[None\]"),
    (lambda images: images[:, :5], r"shape \(360, 5, 8, 1\)"),
    (lambda images: images.repeat(3, axis=3), r"shape \(360, 8, 8, 3\)"),
])
def test_other_images_are_refused(workdir, test_set, change, message):
    with pytest.raises(Mistake, match=message):
        checkpoint.load_model(workdir)(change(test_set.test_images))


def test_npz_has_all_arrays_by_name_and_the_config(workdir, tmp_path):
    told = export_run(workdir, "npz", tmp_path / "net.npz")
    assert told["parameters"] == 80 + 16 + 90
    state = checkpoint.load(workdir)
    with np.load(tmp_path / "net.npz") as file:
        assert len(file.files) == 1 + 6 + 2
        np.testing.assert_array_equal(file["params/head/kernel"], state["params"]["head"]["kernel"])
        np.testing.assert_array_equal(
            file["batch_stats/norm/var"], state["batch_stats"]["norm"]["var"])
        assert json.loads(str(file["config"]))["network"] == "tests.test_export.Own"


def test_an_earlier_checkpoint_is_loaded_and_exported_by_its_position(tmp_path):
    folder = trained(tmp_path / "run", "Own", "checkpoint_every_epochs=0.2", "keep_checkpoints=9")
    first, *_, last = (int(path.name) for path in sorted((folder / "checkpoints").iterdir()))
    expected = checkpoint.load(folder, first)["params"]["head"]["kernel"]
    assert (expected != checkpoint.load(folder)["params"]["head"]["kernel"]).any()
    np.testing.assert_array_equal(
        checkpoint.load_model(folder, first).params["head"]["kernel"], expected)
    process = start_python("-m", "bigbatch.export", f"--workdir={folder}", f"--at={first}",
                           f"--output={tmp_path / 'net.npz'}")
    end(process)
    with np.load(tmp_path / "net.npz") as file:
        np.testing.assert_array_equal(file["params/head/kernel"], expected)
    process = start_python("-m", "bigbatch.export", f"--workdir={folder}", "--at=1",
                           f"--output={tmp_path / 'none'}")
    told = end(process, status=2)
    assert told.count("\n") == 1 and f" {last}." in told
    assert f"no checkpoint at 1 examples seen; those that it has are at {first}," in told
    assert not (tmp_path / "none").exists()


def test_safetensors_has_the_same(workdir, tmp_path):
    pytest.importorskip("safetensors")
    from safetensors import safe_open

    export_run(workdir, "safetensors", tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "numpy") as file:
        assert len(file.keys()) == 8
        np.testing.assert_array_equal(file.get_tensor("params/head/kernel"),
                                      checkpoint.load(workdir)["params"]["head"]["kernel"])
        assert json.loads(file.metadata()["config"])["network"] == "tests.test_export.Own"


@pytest.mark.parametrize(("kind", "module"), [
    ("safetensors", "safetensors.numpy"), ("stablehlo", "flatbuffers")])
def test_a_missing_library_is_told_before_anything_is_read(kind, module, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    name = module.partition(".")[0]
    with pytest.raises(Mistake, match=rf"needs the library {name}, .* or '\.\[export\]'"):
        export_run(tmp_path / "nothing", kind, tmp_path / "net")


def test_stablehlo_takes_any_number_of_images_and_needs_nothing_else(workdir, test_set, tmp_path):
    pytest.importorskip("flatbuffers")
    export_run(workdir, "stablehlo", tmp_path / "net.stablehlo")
    called = jax_export.deserialize((tmp_path / "net.stablehlo").read_bytes()).call
    images = test_set.test_images[:, :7, :7]
    model = checkpoint.load_model(workdir)
    for number in (1, 33):
        np.testing.assert_allclose(
            called(jnp.asarray(images[:number])), model(images[:number]), rtol=1e-4, atol=1e-5)
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_model_that_counts_its_images_is_exported_for_one_number(tmp_path):
    pytest.importorskip("flatbuffers")
    folder = trained(tmp_path / "run", "Counting")
    with pytest.raises(Mistake, match=r"any number of images .*--batch_size=N .*x.shape\[0\]"):
        export_run(folder, "stablehlo", tmp_path / "net")
    export_run(folder, "stablehlo", tmp_path / "net", 4)
    called = jax_export.deserialize((tmp_path / "net").read_bytes()).call
    assert called(np.zeros((4, 7, 7, 1), np.uint8)).shape == (4, 10)


@pytest.mark.parametrize(("arguments", "message"), [
    (("onnx", "net"), "--format is 'onnx'; allowed are npz, safetensors, stablehlo"),
    (("npz", "net", 3), "--batch_size is 3; .*only --format=stablehlo has one"),
    (("npz", "no/folder/net"), "--output is .*no/folder/net; it must be a file in a folder"),
    (("npz", "net"), "has no checkpoint"),
])
def test_what_cannot_be_is_refused(tmp_path, arguments, message):
    kind, output, *more = arguments
    with pytest.raises(Mistake, match=message):
        export_run(tmp_path / "run", kind, tmp_path / output, *more)
