"""The Wide ResNet written out in plain JAX, for one ghost batch: what the tests compare with."""

import jax
import jax.numpy as jnp


def forward(params, images, running=None, before=None):
    """Logits and each normalisation's (mean, var), in the order in which they are applied.

    Args:
        params: as the network's, nested dicts.
        images: one ghost batch.
        running: statistics to normalise by; None: those of the images.
        before: pixels of padding above and on the left of a 3x3 convolution of stride 2, which has
            one below and on the right; None: one, as everywhere.
    """
    statistics = []

    def conv(x, layer, stride=1):
        """The sum over a kernel's places of the image, moved by so much, times its weights."""
        size = layer["kernel"].shape[0]
        first = before if (before is not None and (size, stride) == (3, 2)) else size // 2
        sides = (first, size // 2)
        padded = jnp.pad(x, ((0, 0), sides, sides, (0, 0)))
        rows, columns = (side // stride for side in x.shape[1:3])
        return sum(
            padded[:, top : top + stride * rows : stride, left : left + stride * columns : stride]
            @ layer["kernel"][top, left]
            for top in range(size) for left in range(size)
        )

    def norm_relu(x, layer):
        if running is None:
            mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
        else:
            mean, var = running[len(statistics)]
        statistics.append((mean, var))
        return jax.nn.relu((x - mean) / jnp.sqrt(var + 1e-5) * layer["scale"] + layer["bias"])

    x = conv(images, params["conv"])
    for place, block in sorted(params["blocks"].items()):
        # All groups but the first begin by halving the image.
        stride = 2 if "project" in block and place > 0 else 1
        active = norm_relu(x, block["norm1"])
        y = conv(norm_relu(conv(active, block["conv1"], stride), block["norm2"]), block["conv2"])
        x = y + (conv(active, block["project"], stride) if "project" in block else x)
    x = norm_relu(x, params["norm"]).mean((1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"], statistics


def in_order(batch_stats):
    """The network's running statistics in the order of `forward`'s."""
    layers = [
        block[norm] for _, block in sorted(batch_stats["blocks"].items())
        for norm in ("norm1", "norm2")
    ]
    return [(layer["mean"], layer["var"]) for layer in [*layers, batch_stats["norm"]]]
