"""What a task is refused for, by one line before anything is compiled, and what it may do."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbatch import train
from bigbatch.data import streaming
from bigbatch.mistake import Mistake
from bigbatch.storage.logs import read_events
from bigbatch.tasks import Field, InMemory, classification, contract
from bigbatch.update import network
from tests.support.foreign_tasks import Letters, letters
from tests.support.updates import prepare as make_updater
from tests.support.updates import training_set, with_model

EXAMPLES = 1437


def task(**functions):
    """Classification with some functions in the place of its own."""
    own = {name: getattr(classification, name) for name in contract.FUNCTIONS}
    return types.SimpleNamespace(**{**own, **functions})


def losing(change):
    """A task whose losses are those that `change` makes of classification's."""
    return task(losses=lambda *given: change(classification.losses(*given)))


def preparing(change):
    return task(prepare=lambda *given: change(*classification.prepare(*given)))


def arrays(**given):
    """A task with these arrays for training in the place of classification's."""
    def load(config):
        data = classification.load(config)
        return InMemory({**data.train, **given}, data.test)

    return task(load=load)


REFUSED = {
    "no_losses": (
        types.SimpleNamespace(fields=1, prepare=print, load=print),
        "which has no function fields and no losses; a task has fields, prepare, losses, load"),
    "fields_of_arrays": (
        task(fields=lambda config: [8, 8]), "fields returned a list of 2; it must return a dict"),
    "bare_field": (
        task(fields=lambda config: {"images": (8, 8)}),
        r"has \(8, 8\) for 'images'; it must be a bigbatch.tasks.Field\(shape, dtype\)"),
    "taken_name": (
        task(fields=lambda config: {"record": Field((), np.int32)}), "has the name 'record'; exam"),
    "wide_field": (
        task(fields=lambda config: {"tokens": Field((8,), np.int64)}),
        "has int64 for 'tokens', and JAX's 64-bit mode is off: take a type of 32 bits or less"),
    "prepared_alone": (
        preparing(lambda images, labels: images), r"prepare returned a .*; it must return a pair"),
    "no_inputs": (preparing(lambda images, labels: ((), labels)), "returned no inputs for the net"),
    "one_target": (
        preparing(lambda images, labels: (images, labels[:1])),
        r"returned targets of shape \(1,\) for 32 examples; the first axis must be"),
    "scalar_target": (preparing(lambda images, labels: (images, 3)), r"targets of shape \(\) for"),
    "prepare_mixes": (
        preparing(lambda images, labels: (images - images.mean(axis=0), labels)),
        r"prepare mixes the examples of a batch at .*test_contract.py:\d+, so its result would"),
    "prepare_mixes_targets": (
        preparing(lambda images, labels: (images, jnp.roll(labels, 1))), "prepare mixes the exam"),
    "losses_mix": (
        losing(lambda found: {"loss": (found["loss"][0] - found["loss"][0].mean(),
                                       found["loss"][1])}),
        r"losses mixes the examples of a batch at .*test_contract.py:\d+"),
    "losses_by_ghost_batches": (
        losing(lambda found: {"loss": (
            found["loss"][0].reshape(-1, 16)[:, ::-1].reshape(-1), found["loss"][1])}),
        "in evaluation, fails for 2 examples: TypeError: .*any number, not whole"),
    "losses_pair": (
        losing(lambda found: {"loss": (
            found["loss"][0].reshape(-1, 2)[:, ::-1].reshape(-1), found["loss"][1])}),
        "in evaluation, mixes the examples of a batch"),
    "no_loss": (
        losing(lambda found: {"accuracy": found["accuracy"]}),
        r"losses returned accuracy; it must return a dict of \(values, weights\) by name, and 'l"),
    "losses_bare": (losing(lambda found: found["loss"]), "losses returned a tuple of 2; it must"),
    "no_weights": (losing(lambda found: {"loss": found["loss"][0]}), "for 'loss'; it must be a pa"),
    "summed_values": (
        losing(lambda found: {"loss": (found["loss"][0][:8].sum(), found["loss"][1])}),
        r"losses has values of shape \(\) for 'loss'; it must be \(32,\), one for each example"),
    "one_weight": (
        losing(lambda found: {"loss": (found["loss"][0], 1.0)}), "has weights of shape float for"),
    "whole_weights": (
        losing(lambda found: {"loss": (found["loss"][0], found["loss"][1].astype(int))}),
        "has weights in int32 for 'loss'; where config.dtype is float32 they are added up in flo"),
    "half_values": (
        losing(lambda found: {"loss": (found["loss"][0].astype(jnp.bfloat16), found["loss"][1])}),
        "has values in bfloat16 for 'loss'; where"),
    "loads_a_tuple": (
        task(load=lambda config: (1, 2)),
        "load returned a tuple of 2, and config.data.streaming is False; it must return a bigbatc"),
    "another_name": (
        arrays(masks=np.zeros(EXAMPLES)), "has images, labels, masks for train, and its fields ar"),
    "another_type": (
        arrays(labels=np.zeros(EXAMPLES, np.int64)),
        r"has int64 \(1437,\) for labels of train; by its fields each example is int32 \(\)"),
    "smaller_images": (
        arrays(images=np.zeros((EXAMPLES, 8, 7, 1), np.uint8)),
        r"has uint8 \(1437, 8, 7, 1\) for images of train; .* uint8 \(8, 8, 1\) or larger"),
    "fewer_labels": (
        arrays(labels=np.zeros(9, np.int32)), "has 9 of labels for train, but 1437 of images"),
    "fewer_examples": (
        arrays(images=np.zeros((9, 8, 8, 1), np.uint8), labels=np.zeros(9, np.int32)),
        "has 9 examples for train, but config.data.train_examples is 1437: set --config.data.trai"),
    "about_as_a_list": (
        task(about=lambda config: ["3.13"]),
        r"about must return a dict of JSON values \(texts, .* a log can hold: it is a list of 1"),
    "about_arrays": (
        task(about=lambda config: {"tokens": np.arange(3)}),
        "about must return a dict .*: Object of type ndarray is not JSON"),
    "no_array": (arrays(labels=[0] * EXAMPLES), "has a list of 1437 for labels of train; it must"),
}
globals().update({name: kind for name, (kind, _) in REFUSED.items()})


def config_of(name, *settings):
    return with_model(
        "support.foreign_models.Regression", {}, f"task=tests.tasks.test_contract.{name}",
        *settings)


@pytest.mark.parametrize("name", REFUSED)
def test_an_unfit_task_is_refused_before_compiling(name, tmp_path):
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None)
    said = f"tests.tasks.test_contract.{name}.*{REFUSED[name][1]}"
    with pytest.raises(Mistake, match=said) as told:
        train.train_and_evaluate(config_of(name), tmp_path, show=False)
    assert "\n" not in str(told.value)
    assert compiled == []


@pytest.mark.parametrize(("path", "said"), [
    ("classification", "config.task is 'classification'; it must be a dotted path"),
    ("bigbatch.tasks.classifications", "module 'bigbatch.tasks' has no 'classifications'"),
    ("no_such_package.task", "no module 'no_such_package'"),
])
def test_a_path_that_leads_nowhere_says_so(path, said):
    with pytest.raises(Mistake, match=said):
        network.build(with_model("support.foreign_models.Regression", {}, f"task={path}"))


def test_classification_is_of_two_classes_or_more():
    with pytest.raises(Mistake, match="config.data.num_classes is 1; it must be 2 or more"):
        network.build(with_model("support.foreign_models.Regression", {}, "data.num_classes=1"))


def test_a_reader_that_yields_something_else_is_told_of_by_its_record(tmp_path):
    class Short(Letters):
        def read(self, record, epoch, position):
            return {"letters": self.rows[record][1:]}, ""

    split = streaming.Split(
        Short(letters(4)), {"letters": Field((9,), np.uint16)}, train=False, seed=0)
    with pytest.raises(Mistake, match=r"record 2 has uint16 \(8,\) for 'letters', which is uint16"):
        split.read(2)


# --- what weighs nothing --------------------------------------------------------------------------
nothing = losing(lambda found: {"loss": (found["loss"][0], 0 * found["loss"][1])})
sometimes = losing(lambda found: {**found, "rare": (found["loss"][0], 0 * found["loss"][1])})
unmasked = losing(lambda found: {"loss": (jnp.log(found["loss"][0] - 1e9), found["loss"][1])})


def test_where_nothing_has_weight_the_run_says_so(tmp_path):
    with pytest.raises(Mistake, match="no example of the update from example 0 is of use: all wei"):
        train.train_and_evaluate(config_of("nothing"), tmp_path, show=False)


def test_a_quantity_without_weight_has_no_mean_and_no_other_is_touched(tmp_path):
    train.train_and_evaluate(
        config_of("sometimes", "recipe.epochs=0.5", "recipe.falls=()"), tmp_path, show=False)
    last = read_events(tmp_path / "metrics.jsonl")[-1]
    assert last["train_rare"] is None and last["test_rare"] is None
    assert last["train_loss"] > 0 and last["test_accuracy"] > 0


def test_a_divergence_is_no_want_of_weight(tmp_path):
    with pytest.raises(train.NotFinite):
        train.train_and_evaluate(config_of("unmasked"), tmp_path, show=False)


def test_the_fields_are_what_an_update_is_fed():
    updater = make_updater(config_of("sometimes"))
    assert set(training_set(updater)) == {"images", "labels", "seed"}
    assert updater.net.reported == ("accuracy", "loss", "rare")
