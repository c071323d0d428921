"""Tasks as a package of a user's own would hold them; a config names them by dotted path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from bigbatch.data import sources
from bigbatch.tasks import Field, InMemory, Streamed, classification


def digits_with(config, make):
    """The digits, and under the name `targets` what `make` makes of their labels."""
    data = ConfigDict(config.data)
    data.num_classes = 10
    dataset = sources.load(data)
    return InMemory(
        {"images": dataset.train_images, "targets": make(dataset.train_labels)},
        {"images": dataset.test_images, "targets": make(dataset.test_labels)})


def image_field(config):
    """Of the digits."""
    side = config.data.image_size
    return Field((side, side, 1), np.uint8)


class Mixup:
    """Soft labels: each image is mixed with its neighbour in the ghost batch."""

    fields, load = classification.fields, classification.load

    def prepare(config, fields_B, keys_B, train):
        images, labels = classification.prepare(config, fields_B, keys_B, train)
        soft = jax.nn.one_hot(labels, config.data.num_classes, dtype=images.dtype)
        if not train:
            return images, soft
        keys_B = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys_B)
        share_B = jax.vmap(lambda key: jax.random.uniform(key, dtype=images.dtype))(keys_B)

        def mixed(x):
            groups = x.reshape(-1, config.ghost_size, *x.shape[1:])
            partners = jnp.roll(groups, 1, axis=1).reshape(x.shape)
            share = share_B.reshape(-1, *[1] * (x.ndim - 1))
            return share * x + (1 - share) * partners

        return mixed(images), mixed(soft)

    def losses(config, logits, soft):
        ones = jnp.ones(len(logits), logits.dtype)
        right = (logits.argmax(1) == soft.argmax(1)).astype(logits.dtype)
        return {"loss": (optax.softmax_cross_entropy(logits, soft), ones),
                "accuracy": (right, ones)}


class MultiLabel:
    """Is it even, is it over 4, is it a prime: of some digits this last is not known."""

    def fields(config):
        return {"images": image_field(config), "targets": Field((3,), np.int32)}

    def prepare(config, fields_B, keys_B, train):
        fields = {"images": fields_B["images"], "labels": fields_B["targets"]}
        return classification.prepare(config, fields, keys_B, train)

    def losses(config, logits, targets):
        known = (targets >= 0).astype(logits.dtype)
        cross_entropy = optax.sigmoid_binary_cross_entropy(logits, targets)
        right = ((logits > 0) == (targets > 0)).astype(logits.dtype)
        weights = known.sum(axis=1)
        return {"loss": ((cross_entropy * known).sum(axis=1), weights),
                "accuracy": ((right * known).sum(axis=1), weights)}

    def load(config):
        return digits_with(config, lambda labels: np.stack(
            [labels % 2 == 0, labels > 4, np.where(labels < 8, np.isin(labels, (2, 3, 5, 7)), -1)],
            axis=1).astype(np.int32))


class Regression:
    """Which number it is, as a number. The root of the mean squared error is told too."""

    def fields(config):
        return {"images": image_field(config), "targets": Field((), np.float32)}

    def prepare(config, fields_B, keys_B, train):
        fields = {"images": fields_B["images"], "labels": fields_B["targets"]}
        return classification.prepare(config, fields, keys_B, train)

    def losses(config, outputs, targets):
        error, ones = outputs[:, 0] - targets, jnp.ones(len(targets), outputs.dtype)
        return {"loss": (error**2, ones), "absolute_error": (jnp.abs(error), ones)}

    def load(config):
        return digits_with(config, lambda labels: labels.astype(np.float32))

    def derived(config, means):
        return {"deviation": means["loss"] ** 0.5}


class ClassWeights:
    """Classification in which a class counts as `config.task_options.weights` say."""

    fields, prepare, load = (
        classification.fields, classification.prepare, classification.load)

    def losses(config, outputs, labels):
        found = classification.losses(config, outputs, labels)
        weigh = jnp.asarray(config.task_options.weights, found["loss"][0].dtype)[labels]
        return {name: (values * weigh, weights * weigh) for name, (values, weights) in
                found.items()}


# --- examples that are no images ------------------------------------------------------------------
class Words:
    """Eight letters of a cycle, each of which the network is to guess from the one before it."""

    def fields(config):
        return {"letters": Field((9,), np.uint16)}

    def prepare(config, fields_B, keys_B, train):
        letters = fields_B["letters"].astype(jnp.int32)
        return letters[:, :-1], letters[:, 1:]

    def losses(config, logits, targets):
        counts = (targets > 0).astype(logits.dtype)  # 0 is padding
        found = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return {"loss": ((found * counts).sum(axis=1), counts.sum(axis=1))}

    def tokens(config):
        return 8

    def about(config):
        return {"letters": "made up", "lengths": (2, 9)}

    def load(config):
        train, test = (letters(examples) for examples in (
            config.data.train_examples, config.data.test_examples))
        if config.data.streaming:
            return Streamed(Letters(train), Letters(test))
        return InMemory({"letters": train}, {"letters": test})


def letters(examples):
    """Rows of several lengths, filled up with 0."""
    random = np.random.default_rng(examples)
    rows = random.integers(0, 6, (examples, 1)) + np.arange(9)
    lengths = random.integers(2, 10, (examples, 1))
    return np.where(np.arange(9) < lengths, rows % 6 + 1, 0).astype(np.uint16)


class Letters:
    """Reads rows one by one."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def read(self, record, epoch, position):
        return {"letters": self.rows[record]}, ""


class Bigrams(nnx.Module):
    """Logits from an embedding of each letter, and none of its neighbours."""

    def __init__(self, num_classes, dtype, rngs, *, mix=False):
        types = {"dtype": dtype, "param_dtype": jnp.promote_types(dtype, jnp.float32)}
        self.embed = nnx.Embed(num_classes, 8, **types, rngs=rngs)
        self.head = nnx.Linear(8, num_classes, **types, rngs=rngs)
        self.mix = mix

    def __call__(self, letters, train, keys):
        x = self.embed(letters)
        return self.head(x - x.mean(axis=0) if self.mix else x)
