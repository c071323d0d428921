"""Benchmarks. This comes before JAX is imported, which reads the environment."""

import os

# Runs start in processes of their own beside this one, which keeps what it used of a GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # compilations are among what is measured
