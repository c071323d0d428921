"""Causal attention, with rotary positions and grouped heads.

Vaswani et al., "Attention Is All You Need", NeurIPS 2017; rotary positions: Su et al., "RoFormer",
2021; groups of heads of queries that share one head of keys and values: Ainslie et al., "GQA",
EMNLP 2023.

The letters of shapes: B examples, T tokens (S: those looked at), D width, N heads of queries, K of
keys and values, G = N / K, H = D / N features of a head, R = H / 2.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from bigbatch.mistake import Mistake

IMPLEMENTATIONS = ("xla", "cudnn", "splash")  # see `attend`
LANES = 128  # of a TPU's vectors: the kernels take blocks of so many tokens, or of multiples
BLOCKS = (4 * LANES, 2 * LANES, LANES)


class Attention(nnx.Module):
    """Causal attention with `heads` of queries, in groups that share one head of keys and values.

    An example's result depends on its own tokens only, and a token's on those up to it.
    """

    def __init__(
        self, width: int, heads: int, key_heads: int, implementation: str,
        linear: Callable[..., nnx.Linear], residual: Callable[..., nnx.Linear],
    ):
        self.size = width // heads
        self.query = linear(width, width)
        self.key = linear(width, key_heads * self.size)
        self.value = linear(width, key_heads * self.size)
        self.output = residual(width, width)
        self.implementation = implementation

    def __call__(self, x_BxTxD: jax.Array, angles_TxR: jax.Array | None) -> jax.Array:
        def by_heads(layer: nnx.Linear) -> jax.Array:
            y = layer(x_BxTxD)
            return y.reshape(*y.shape[:2], -1, self.size)

        query_BxTxNxH, key_BxTxKxH = by_heads(self.query), by_heads(self.key)
        if angles_TxR is not None:
            query_BxTxNxH = rotate(query_BxTxNxH, angles_TxR)
            key_BxTxKxH = rotate(key_BxTxKxH, angles_TxR)
        y = attend(query_BxTxNxH, key_BxTxKxH, by_heads(self.value), self.implementation)
        return self.output(y.reshape(*y.shape[:2], -1))


def rotary_angles(length: int, size: int, base: float, dtype: jnp.dtype) -> jax.Array:
    """By how much pair r of a head's features turns at token t: t base^(-2r / size).

    Args:
        length: T.
        size: H, an even number.
        base: see above.
        dtype: of the angles.

    Returns:
        (length, size / 2).
    """
    frequencies_R = base ** (-jnp.arange(0, size, 2, dtype=dtype) / size)
    return jnp.arange(length, dtype=dtype)[:, None] * frequencies_R


def rotate(x_BxTxNxH: jax.Array, angles_TxR: jax.Array) -> jax.Array:
    """Turns each pair of features (r, r + H / 2) by its angle, in the angles' type.

    The product of a query and a key that are turned so depends on the distance of their tokens.
    """
    cos_TxNxR, sin_TxNxR = jnp.cos(angles_TxR)[:, None], jnp.sin(angles_TxR)[:, None]
    first, second = jnp.split(x_BxTxNxH.astype(angles_TxR.dtype), 2, axis=-1)
    turned = (first * cos_TxNxR - second * sin_TxNxR, second * cos_TxNxR + first * sin_TxNxR)
    return jnp.concatenate(turned, axis=-1).astype(x_BxTxNxH.dtype)


def attend(
    query_BxTxNxH: jax.Array, key_BxTxKxH: jax.Array, value_BxTxKxH: jax.Array,
    implementation: str = "xla",
) -> jax.Array:
    """The values of the tokens up to each token, averaged by softmax(query · key / sqrt(H)).

    By `jax.nn.dot_product_attention`, whose softmax is in float32 whatever the inputs' type. So in
    float64 it is written out here.

    Args:
        query_BxTxNxH: head n of them looks at head n // G of the keys and values.
        key_BxTxKxH: K divides N.
        value_BxTxKxH: as the keys.
        implementation: "xla" keeps the weights of all pairs of tokens in memory. "cudnn" are the
            flash kernels of an NVIDIA GPU, which do not; "splash" are those for TPUs that come
            with JAX, and on other devices this is "xla". Not read in float64.

    Returns:
        (B, T, N, H), in the inputs' type.

    Raises:
        Mistake: if cuDNN is not there or has no kernel for these shapes and this type, or those for
            TPUs do not take sequences of this length.
    """
    if query_BxTxNxH.dtype != jnp.float64:
        if implementation == "splash":
            _block(query_BxTxNxH.shape[1])  # so that a length is refused on any device
            return jax.lax.platform_dependent(
                query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, tpu=splash, default=attend)
        try:
            return jax.nn.dot_product_attention(
                query_BxTxNxH, key_BxTxKxH, value_BxTxKxH, is_causal=True,
                implementation=implementation,
            )
        except (NotImplementedError, RuntimeError, ValueError) as error:
            if implementation == "xla":
                raise
            said = " ".join(str(error).split()).rstrip(".")
            raise Mistake(
                f"model.attention is {implementation!r}, but JAX says: {said}. 'xla' runs anywhere."
            ) from None
    batch, length, heads, size = query_BxTxNxH.shape
    query_BxTxKxGxH = query_BxTxNxH.reshape(batch, length, key_BxTxKxH.shape[2], -1, size)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", query_BxTxKxGxH, key_BxTxKxH) / math.sqrt(size)
    seen_TxS = jnp.tril(jnp.ones((length, length), bool))
    weights_BxKxGxTxS = jax.nn.softmax(jnp.where(seen_TxS, scores, -jnp.inf))
    averaged = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BxKxGxTxS, value_BxTxKxH)
    return averaged.reshape(batch, length, heads, size)


def splash(
    query_BxTxNxH: jax.Array, key_BxTxKxH: jax.Array, value_BxTxKxH: jax.Array,
    interpret: bool = False,
) -> jax.Array:
    """`attend` by JAX's splash attention, kernels for TPUs that skip what is not looked at.

    They never hold the weights of all pairs of tokens, forward or backward (Dao et al.,
    "FlashAttention", NeurIPS 2022).

    Args:
        query_BxTxNxH: see `attend`.
        key_BxTxKxH: see there.
        value_BxTxKxH: see there.
        interpret: whether the kernels are run by JAX step by step, on any device.

    Raises:
        Mistake: if T is no multiple of 128.
    """
    # Imported here, as only this needs it.
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    _, length, heads, size = query_BxTxNxH.shape
    kernel = library.make_splash_mha(
        library.MultiHeadMask([library.CausalMask((length, length))] * heads),
        block_sizes=library.BlockSizes(**dict.fromkeys(
            ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"),
            _block(length))),
        head_shards=1, q_seq_shards=1, interpret=interpret)
    query_BxTxNxH = query_BxTxNxH * (1.0 / math.sqrt(size))
    by_heads = (x.swapaxes(1, 2) for x in (query_BxTxNxH, key_BxTxKxH, value_BxTxKxH))
    return jax.vmap(kernel)(*by_heads).swapaxes(1, 2)


def _block(length: int) -> int:
    """The tokens of a block of `splash`; raises Mistake if it takes no sequences of this length."""
    for block in BLOCKS:
        if length % block == 0:
            return block
    raise Mistake(
        f"model.attention is 'splash', whose kernels take sequences of a multiple of {LANES} "
        f"tokens, but these have {length}; 'xla' takes any."
    )
