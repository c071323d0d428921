"""Decoder-only transformers: GPT-2, Llama, and what lies between them.

Vaswani et al., "Attention Is All You Need", NeurIPS 2017, with a normalisation before each branch
and after the last block (Radford et al., "Language Models are Unsupervised Multitask Learners",
2019: GPT-2). The options: RMSNorm (Zhang & Sennrich, NeurIPS 2019), SwiGLU (Shazeer, "GLU Variants
Improve Transformer", 2020), and what is in `attention`: rotary positions and grouped heads. The
defaults are Llama's (Touvron et al. 2023). GPT-2 is norm="layer", positions="learned",
activation="gelu", bias=True, tied=True.

The letters of shapes: B examples, T tokens, D width, H = D / heads, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bigbatch.mistake import Mistake
from bigbatch.models.attention import IMPLEMENTATIONS, Attention, rotary_angles
from bigbatch.models.blocks import Blocks
from bigbatch.models.dropout import dropout
from bigbatch.models.layer_norms import LayerNorm, RMSNorm

# Each takes the statistics in float32 at least. The variance is the mean square of the differences,
# since the difference of mean squares loses digits where a feature is far from 0.
NORMS = {"rms": RMSNorm, "layer": partial(LayerNorm, use_fast_variance=False)}
OPTIONS = {"norm": NORMS, "positions": ("rotary", "learned"),
           "activation": ("swiglu", "gelu"), "attention": IMPLEMENTATIONS}
DEVIATION = 0.02  # of the initial weights


class FeedForward(nnx.Module):
    """down(silu(gate(x)) * up(x)) (SwiGLU), or down(gelu(up(x))) with GPT-2's tanh form of GELU."""

    def __init__(
        self, width: int, hidden: int, activation: str,
        linear: Callable[..., nnx.Linear], residual: Callable[..., nnx.Linear],
    ):
        self.gate = linear(width, hidden) if activation == "swiglu" else None
        self.up = linear(width, hidden)
        self.down = residual(hidden, width)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        y = self.up(x_BxTxD)
        if self.gate is None:
            return self.down(nnx.gelu(y, approximate=True))
        return self.down(nnx.silu(self.gate(x_BxTxD)) * y)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), each branch with dropout."""

    def __init__(
        self, norm: Callable[[], nnx.Module], attention: Callable[[], Attention],
        feed_forward: Callable[[], FeedForward], rate: float, tag: int,
    ):
        self.attention_norm, self.attention = norm(), attention()
        self.feed_forward_norm, self.feed_forward = norm(), feed_forward()
        self.rate, self.tag = rate, tag

    def __call__(
        self, x: jax.Array, angles_TxR: jax.Array | None, train: bool, keys_B: jax.Array
    ) -> jax.Array:
        y = self.attention(self.attention_norm(x), angles_TxR)
        x = x + dropout(y, self.rate, keys_B, train, self.tag)
        y = self.feed_forward(self.feed_forward_norm(x))
        return x + dropout(y, self.rate, keys_B, train, self.tag + 1)


class Transformer(nnx.Module):
    """Logits of the next token, for sequences of tokens."""

    def __init__(
        self,
        num_classes: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        *,
        blocks: int,
        width: int,
        heads: int,
        hidden: int,
        key_heads: int | None = None,
        max_length: int | None = None,
        norm: str = "rms",
        positions: str = "rotary",
        activation: str = "swiglu",
        bias: bool = False,
        tied: bool = False,
        dropout_rate: float = 0.0,
        epsilon: float = 1e-5,
        rotary_base: float = 10_000.0,
        attention: str = "xla",
        checkpoint_blocks: bool = False,
    ):
        """Args:
        num_classes: the vocabulary's size.
        dtype: to compute in; parameters, embeddings, normalisations, angles, the softmax of
            attention and logits are float32 (float64 for float64).
        rngs: Flax's random streams; `params` is used.
        blocks: how many.
        width: features of a token.
        heads: of queries; `width / heads` features each.
        hidden: features between the layers of a feed-forward branch. GPT-2's is 4 x width; SwiGLU
            has as many parameters at 8/3 x width.
        key_heads: heads of keys and values, a divisor of `heads`; None: as many as `heads`.
        max_length: the longest sequence; None with rotary positions: any.
        norm: "rms" or "layer", both with a learned scale, the latter with a bias as `bias` says.
        positions: "rotary" (a head's feature i turns with i + H/2, as in Llama; the pairs 2i, 2i+1
            of the paper are the same up to the order of the kernels' columns), or "learned".
        activation: "swiglu" or "gelu".
        bias: whether layers have one. The head has none.
        tied: whether the head's kernel is the table of tokens.
        dropout_rate: of the embedded tokens and of each branch's result. Weights of attention are
            not dropped, since no flash kernel takes a key an example.
        epsilon: added to the variance by the normalisations.
        rotary_base: of the angles: feature i turns by base^(-2i/H) a token.
        attention: "xla", or "cudnn" for the flash kernels of an NVIDIA GPU, in bfloat16 only.
        checkpoint_blocks: whether a block's activations are computed again in the backward pass
            instead of kept.

        Initial weights are N(0, 0.02²) (Radford et al. 2018, GPT), and N(0, 0.02² / (2 blocks)) in
        the two layers of a block whose results are added to the residual (Radford et al. 2019).
        Biases begin at 0 and scales at 1.

        Raises:
            Mistake: if an option is unknown, or the sizes do not fit together.
        """
        key_heads = heads if key_heads is None else key_heads
        _check_sizes(num_classes, blocks=blocks, width=width, heads=heads, hidden=hidden,
                     key_heads=key_heads, max_length=1 if max_length is None else max_length)
        _check_options(dtype, width // heads, max_length, norm=norm, positions=positions,
                       activation=activation, attention=attention)
        param_dtype = jnp.promote_types(dtype, jnp.float32)
        layer = {"param_dtype": param_dtype, "rngs": rngs}
        normal = nnx.initializers.normal
        linear = partial(nnx.Linear, use_bias=bias, dtype=dtype, kernel_init=normal(DEVIATION),
                         **layer)
        residual = partial(linear, kernel_init=normal(DEVIATION / math.sqrt(2 * blocks)))
        # In the parameters' type, in which the gradients of a token's many places are then summed.
        embed = partial(nnx.Embed, features=width, dtype=param_dtype,
                        embedding_init=normal(DEVIATION), **layer)
        has_bias = {"use_bias": bias} if norm == "layer" else {}
        # In the parameters' type, so that a scale near 1 is not rounded to bfloat16.
        make_norm = partial(NORMS[norm], width, epsilon=epsilon, dtype=param_dtype, **has_bias,
                            **layer)
        make_attention = partial(Attention, width, heads, key_heads, attention, linear, residual)
        make_forward = partial(FeedForward, width, hidden, activation, linear, residual)

        self.tokens = embed(num_classes)
        self.positions = embed(max_length) if positions == "learned" else None
        self.blocks = Blocks([
            Block(make_norm, make_attention, make_forward, dropout_rate, tag=1 + 2 * number)
            for number in range(blocks)
        ])
        self.norm = make_norm()
        self.head = None if tied else linear(width, num_classes, use_bias=False)
        self.max_length, self.head_size, self.rotary_base = max_length, width // heads, rotary_base
        self.dropout_rate, self.checkpoint_blocks = dropout_rate, checkpoint_blocks
        self.dtype = dtype

    def __call__(self, tokens_BxT: jax.Array, train: bool, keys_B: jax.Array) -> jax.Array:
        """Logits (B, T, V), in the parameters' type; those at t follow from the tokens up to t.

        A token outside of the vocabulary has NaN for its embedding.

        Raises:
            Mistake: if the tokens are not whole numbers (B, T), or T is more than `max_length`.
        """
        if tokens_BxT.ndim != 2 or not jnp.issubdtype(tokens_BxT.dtype, jnp.integer):
            raise Mistake(
                f"The transformer got {tokens_BxT.dtype} of shape {tokens_BxT.shape}; it takes "
                "whole numbers of shape (examples, tokens)."
            )
        length = tokens_BxT.shape[1]
        if self.max_length is not None and length > self.max_length:
            raise Mistake(
                f"model.max_length is {self.max_length}, but the sequences have {length} tokens."
            )
        x, angles = self.tokens(tokens_BxT), None
        if self.positions is None:
            angles = rotary_angles(length, self.head_size, self.rotary_base, self.norm.dtype)
        else:
            x = x + self.positions(jnp.arange(length))
        x = dropout(x.astype(self.dtype), self.dropout_rate, keys_B, train, tag=0)
        for block in self.blocks.calls(recompute=self.checkpoint_blocks):
            x = block(x, angles, train, keys_B)
        return self._logits(self.norm(x))

    def _logits(self, x_BxTxD: jax.Array) -> jax.Array:
        dtype, tied = self.dtype, self.head is None
        table_VxD = self.tokens.embedding[...] if tied else self.head.kernel[...].T
        # Products of bfloat16, added up in float32; by the preset in the backward pass as well.
        precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if dtype == jnp.bfloat16 else None
        return jnp.einsum("BTD,VD->BTV", x_BxTxD.astype(dtype), table_VxD.astype(dtype),
                          precision=precision, preferred_element_type=x_BxTxD.dtype)


def _check_sizes(vocabulary: int, **sizes: Any) -> None:
    if vocabulary < 1:
        raise Mistake(f"The vocabulary is {vocabulary}; it must be 1 or more.")
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise Mistake(f"model.{name} is {size!r}; it must be a whole number, 1 or more.")
    for name, of in (("heads", "width"), ("key_heads", "heads")):
        if sizes[of] % sizes[name]:
            raise Mistake(
                f"model.{name} is {sizes[name]}; it must divide model.{of}, which is {sizes[of]}."
            )


def _check_options(
    dtype: jnp.dtype, head_size: int, max_length: int | None, **chosen: str
) -> None:
    for key, value in chosen.items():
        if value not in OPTIONS[key]:
            raise Mistake(f"model.{key} is {value!r}; it must be {' or '.join(OPTIONS[key])}.")
    if chosen["positions"] == "rotary" and head_size % 2:
        raise Mistake(
            f"model.width / model.heads is {head_size}; rotary positions turn pairs of a head's "
            "features, so it must be even."
        )
    if chosen["positions"] == "learned" and max_length is None:
        raise Mistake("model.max_length is None; learned positions need the longest length.")
    if chosen["attention"] == "cudnn" and dtype != jnp.bfloat16:
        raise Mistake(
            f"model.attention is 'cudnn', whose kernels compute in bfloat16, but config.dtype is "
            f"{jnp.dtype(dtype)}; set model.attention='xla' or config.dtype='bfloat16'."
        )
