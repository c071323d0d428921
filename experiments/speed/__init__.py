"""Benchmarks. The environment is set here, before JAX is imported and reads it."""

import os

# Runs are processes beside this one, and need a part of the GPU's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # compilations are among what is measured
