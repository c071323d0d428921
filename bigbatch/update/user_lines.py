"""Which lines are the user's own: outside of this package, of JAX, Flax and Optax, of Python."""

import sysconfig
from pathlib import Path

import flax
import jax
import optax

import bigbatch

BIGBATCH, JAX, FLAX, OPTAX = (
    f"{Path(package.__file__).parent}/" for package in (bigbatch, jax, flax, optax))
PYTHON = f"{sysconfig.get_path('stdlib')}/"


def is_users(file: str) -> bool:
    """Whether the code in `file`, as a frame names it, is the user's."""
    if file.startswith(("<", BIGBATCH, JAX, FLAX, OPTAX)) or "/jaxlib/" in file:
        return False
    return not file.startswith(PYTHON) or "-packages/" in file
