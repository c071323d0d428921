"""Augmentation on the device: reflection padding, random crop, horizontal flip, normalisation.

The random numbers of an example follow from the seed, the epoch and the example's position in the
epoch. They do not depend on the batch size, the device or the microbatch.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bigbatch.mistake import Mistake


def example_keys(key: jax.Array, epoch_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """One random key per example: `key` with the epoch, then the position in it, folded in.

    Args:
        key: of the run: jax.random.key(seed, impl="threefry2x32") with a tag folded in.
        epoch_B: the epoch of each example.
        position_B: the position of each example in its epoch.
    """
    def one(epoch: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, epoch), position)

    return jax.vmap(one)(epoch_B, position_B)


def check_window(height: int, width: int, pad: int, crop: int) -> None:
    """Checks that `pad` and `crop` fit images of `height` x `width` pixels.

    Raises:
        Mistake: if they do not fit, with the values and what is allowed.
    """
    named = f"config.data.augment has pad={pad} and crop={crop}"
    if pad < 0 or crop < 0:
        raise Mistake(f"{named}; both must be 0 or more.")
    side = min(height, width)
    if crop == 0 and pad:
        raise Mistake(
            f"{named}, which cuts nothing out of the padded image: set pad=0, or crop={side} for "
            "the image's own size."
        )
    if pad >= side:
        raise Mistake(
            f"{named}, but the images are {height}x{width}; a reflection needs a pad of at most "
            f"{side - 1}."
        )
    if crop > side:
        raise Mistake(
            f"{named}, but the images are {height}x{width}; the crop may be {side} at most, since "
            "evaluation cuts it out of the centre without padding."
        )


def crop_and_flip(
    images_BxHxWxC: jax.Array, keys_B: jax.Array, pad: int, crop: int, flip: bool
) -> jax.Array:
    """Pads images by reflection, crops them at random, and mirrors half of them.

    The reflection does not repeat the edge: pixel -1 is pixel 1. No padded image is stored.

    Args:
        images_BxHxWxC: uint8.
        keys_B: one random key per example; see `example_keys`.
        pad: pixels to add on each side; 0 if `crop` is 0.
        crop: side of the square to cut out, at most that of the image; 0 keeps the whole image.
        flip: whether to mirror each example left to right with probability 1/2.

    Returns:
        uint8 (B, crop, crop, C); (B, H, W, C) where `crop` is 0.

    Raises:
        Mistake: see `check_window`.
    """
    height, width = images_BxHxWxC.shape[1:3]
    check_window(height, width, pad, crop)
    # Raw bits are fixed by the Threefry cipher; JAX's samplers may change with a release.
    bits_Bx3 = jax.vmap(lambda key: jax.random.bits(key, (3,), jnp.uint32))(keys_B)
    upright_B = jnp.zeros(keys_B.shape, bool)
    mirrored_B = bits_Bx3[:, 2] >> 31 == 1 if flip else upright_B
    if not crop:
        mirrored_Bx1x1x1 = mirrored_B[:, None, None, None]
        return jnp.where(mirrored_Bx1x1x1, images_BxHxWxC[:, :, ::-1], images_BxHxWxC)

    def lines(size: int, bits_B: jax.Array, mirrored_B: jax.Array) -> jax.Array:
        """The row (or column) of the image that each row (or column) of the output shows."""
        offsets = size + 2 * pad - crop + 1
        within = jnp.arange(crop, dtype=jnp.int32)
        within = jnp.where(mirrored_B[:, None], crop - 1 - within, within)
        line = (bits_B % jnp.uint32(offsets)).astype(jnp.int32)[:, None] + within - pad
        # Reflect at pixel 0, then at the last pixel.
        return size - 1 - jnp.abs(size - 1 - jnp.abs(line))

    return jax.lax.platform_dependent(
        images_BxHxWxC, lines(height, bits_Bx3[:, 0], upright_B),
        lines(width, bits_Bx3[:, 1], mirrored_B), tpu=lines_by_products, default=lines_by_index)


def lines_by_index(
    images_BxHxWxC: jax.Array, rows_Bxh: jax.Array, cols_Bxw: jax.Array
) -> jax.Array:
    """Of each image the rows and columns of these numbers, (B, h, w, C), by one gather."""
    example_B = jnp.arange(images_BxHxWxC.shape[0])
    at = images_BxHxWxC.at[example_B[:, None, None], rows_Bxh[:, :, None], cols_Bxw[:, None, :]]
    return at.get(mode="promise_in_bounds")


def lines_by_products(
    images_BxHxWxC: jax.Array, rows_Bxh: jax.Array, cols_Bxw: jax.Array
) -> jax.Array:
    """What `lines_by_index` returns for uint8, by two products with matrices of 0 and 1.

    A TPU multiplies sooner than it gathers. bfloat16 has the whole numbers up to 256, and each sum
    one term that is not 0, so no digit is lost.
    """
    batch, height, width, channels = images_BxHxWxC.shape
    rows_Bxhx_ = jax.nn.one_hot(rows_Bxh, height, dtype=jnp.bfloat16)
    cols_Bxwx_ = jax.nn.one_hot(cols_Bxw, width, dtype=jnp.bfloat16)
    flat_BxHx_ = images_BxHxWxC.astype(jnp.bfloat16).reshape(batch, height, width * channels)
    cut_BxhxWxC = (rows_Bxhx_ @ flat_BxHx_).reshape(batch, -1, width, channels)
    return jnp.einsum("bwW,bhWc->bhwc", cols_Bxwx_, cut_BxhxWxC).astype(jnp.uint8)


def crop_centre(images_BxHxWxC: jax.Array, crop: int) -> jax.Array:
    """Crops images for evaluation: the central square of side `crop`, or the whole if it is 0.

    Args:
        images_BxHxWxC: of any type.
        crop: side of the square. If the margin is odd, its extra pixel is below and to the right.

    Raises:
        Mistake: if the crop is larger than the images.
    """
    height, width = images_BxHxWxC.shape[1:3]
    check_window(height, width, 0, crop)
    top, left = ((size - (crop or size)) // 2 for size in (height, width))
    return images_BxHxWxC[:, top : top + (crop or height), left : left + (crop or width)]


def normalise(
    images_BxHxWxC: jax.Array, mean: tuple[float, ...], std: tuple[float, ...], dtype: jnp.dtype
) -> jax.Array:
    """(images - mean) / std per channel, computed in float32 (float64 if `dtype` is float64).

    Args:
        images_BxHxWxC: uint8.
        mean: one value per channel, on the scale 0 to 255.
        std: one value per channel, on the same scale.
        dtype: of the result.
    """
    wide = jnp.promote_types(dtype, jnp.float32)
    centred = images_BxHxWxC.astype(wide) - np.asarray(mean, wide)
    return (centred / np.asarray(std, wide)).astype(dtype)
