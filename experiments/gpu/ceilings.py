"""What JAX finds on this machine, and how fast its GPU multiplies, convolves and copies.

    python experiments/gpu/ceilings.py

Medians of ten. Ends with status 1 where JAX finds no GPU.
"""

import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

SIDE = 8192


def seconds(function: Callable, *arguments: jax.Array) -> float:
    """The median of ten calls after a first one."""
    call, took = jax.jit(function), []
    for _ in range(11):
        began = time.perf_counter()
        call(*arguments).block_until_ready()
        took.append(time.perf_counter() - began)
    return statistics.median(took[1:])


def main() -> None:
    """Prints them."""
    device = jax.devices()[0]
    print(jax.__version__, jax.default_backend(), len(jax.devices()), device.device_kind,
          " ".join(device.client.platform_version.split()))
    if jax.default_backend() != "gpu":
        sys.exit(1)
    for dtype in (jnp.bfloat16, jnp.float32):
        square = jax.random.normal(jax.random.key(0), (SIDE, SIDE), dtype)
        rate = 2 * SIDE**3 / seconds(jnp.matmul, square, square)
        print(f"matrix product of {SIDE}, {dtype.__name__}: {rate / 1e12:.0f} TFLOP/s")
    images = jax.random.normal(jax.random.key(0), (640, 32, 32, 64), jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 64, 64), jnp.bfloat16)
    took = seconds(lambda x, w: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")), images, kernel)
    print(f"convolution of 640x32x32x64 to 64, bfloat16: "
          f"{2 * images.size * kernel.size / 64 / took / 1e12:.0f} TFLOP/s")
    long = jnp.ones(2**29, jnp.float32)
    print(f"copy of 2 GiB: {2 * long.nbytes / seconds(lambda x: x + 1, long) / 1e12:.2f} TB/s")


if __name__ == "__main__":
    main()
