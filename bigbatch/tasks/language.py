"""A language model: the next token of text, from those before it in the same sequence.

An example is a sequence of `config.data.options.length` tokens and the one after it. The network is
called with int32 tokens (B, T) and returns logits (B, T, V), where V is `config.data.num_classes`.
A loss is a mean over tokens, in nats. Nothing is learned, and nothing is reported, of a token that
is padding or the first of a document: the one after the separator that ends the document before.
What is paid attention to is up to the network; the separator does not stop it.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bigbatch.data import token_sources
from bigbatch.data.tokens import dtype_for, open_sequences, read_options
from bigbatch.mistake import Mistake
from bigbatch.tasks import Field, InMemory, Streamed

RESIDENT = 2**33  # bytes of sequences that are kept on the devices at most
LARGEST_EXPONENT = 700.0  # of a perplexity, a float


def fields(config: ConfigDict) -> dict[str, Field]:
    """The arrays of an example: `tokens`, one more than are predicted."""
    length = read_options(config.data).length
    return {"tokens": Field((length + 1,), dtype_for(config.data.num_classes))}


def tokens(config: ConfigDict) -> int:
    """The tokens of an example, in which lengths of a run may be stated and are shown."""
    return read_options(config.data).length


def prepare(
    config: ConfigDict, fields_B: Mapping[str, jax.Array], keys_B: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The tokens to predict from, and those to predict with whether they count."""
    chosen = read_options(config.data)
    tokens_BxT1 = fields_B["tokens"].astype(jnp.int32)
    inputs_BxT, wanted_BxT = tokens_BxT1[:, :-1], tokens_BxT1[:, 1:]
    counts_BxT = jnp.ones(wanted_BxT.shape, bool)
    if chosen.separator is not None:
        counts_BxT &= inputs_BxT != chosen.separator
    # Where one token is both, the first of a row of them ends a document, and is learned.
    if chosen.padding not in (None, chosen.separator):
        counts_BxT &= (inputs_BxT != chosen.padding) & (wanted_BxT != chosen.padding)
    return inputs_BxT, {"tokens": wanted_BxT, "counts": counts_BxT}


def losses(
    config: ConfigDict, outputs_BxTxV: jax.Array, targets: Mapping[str, jax.Array]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The cross entropy of the tokens that count, and how many they are; see `bigbatch.tasks`."""
    logits = outputs_BxTxV.astype(jnp.promote_types(outputs_BxTxV.dtype, jnp.float32))
    counts_BxT = targets["counts"]
    whole = jax.nn.logsumexp(logits, axis=-1)
    # Not `take_along_axis`, whose derivative is a scatter: this one is fused with the others.
    is_wanted = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets["tokens"][..., None]
    losses_BxT = whole - jnp.sum(jnp.where(is_wanted, logits, 0.0), axis=-1)
    weights_B = jnp.sum(counts_BxT, axis=1).astype(logits.dtype)

    def summed(values_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(jnp.where(counts_BxT, values_BxT, 0.0), axis=1), weights_B

    found = {"loss": summed(losses_BxT)}
    if smoothing := config.label_smoothing:
        evenly = whole - jnp.mean(logits, axis=-1)
        found["objective"] = summed((1.0 - smoothing) * losses_BxT + smoothing * evenly)
    return found


def derived(config: ConfigDict, means: Mapping[str, float]) -> dict[str, float]:
    """Perplexity and, where the bytes of a token are known, bits a byte, of a mean loss."""
    found = {"perplexity": math.exp(min(means["loss"], LARGEST_EXPONENT))}
    size = read_options(config.data).bytes_per_token
    if size is not None:
        found["bits_per_byte"] = means["loss"] / math.log(2.0) / size
    return found


def load(config: ConfigDict) -> InMemory | Streamed:
    """Opens the sequences that `config.data` names; see `data.tokens`.

    Raises:
        Mistake: see `tokens.open_sequences`; or if they are too many to be kept on the devices.
    """
    train, test = open_sequences(config.data)
    if config.data.streaming:
        return Streamed(train, test)
    size = sum(len(part) for part in (train, test)) * (train.length + 1) * train.dtype.itemsize
    if size > RESIDENT:
        raise Mistake(
            f"the sequences of {token_sources.describe(config.data)} take {size / 2**30:.1f} GiB on"
            " each device: set --config.data.streaming=True, and they are read as they are needed."
        )
    return InMemory(*({"tokens": part.take(range(len(part)))} for part in (train, test)))


def about(config: ConfigDict) -> dict[str, Any]:
    """What a record says of the data beside the config, so that it can be told whether it is the
    same elsewhere."""
    return token_sources.about(config.data)
