"""Where a program comes from, by JAX's own cache in folders and the stand-in for a bucket."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from bigbatch.programs.origin import Origin, obtain
from bigbatch.storage.bucket_programs import BucketPrograms


@pytest.fixture
def machine(tmp_path):
    """Makes JAX keep its programs in a folder of that name, as it does in a new process there."""
    names = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in names}

    def move(name):
        for option, value in names.items():
            jax.config.update(option, value)
        jax.config.update("jax_compilation_cache_dir", name and str(tmp_path / name))
        compilation_cache.reset_cache()
        return tmp_path / (name or "")

    yield move
    for option, value in before.items():
        jax.config.update(option, value)
    compilation_cache.reset_cache()


def lower(options=None):
    return jax.jit(lambda x: jnp.sin(x) + 1, compiler_options=options).lower(
        jax.ShapeDtypeStruct((3,), np.float32))


def start(options=None, bucket=True):
    """Where one start has the program from, which must work."""
    programs = BucketPrograms("gs://bucket/run", writing=True) if bucket else None
    compiled, found = obtain(lower(options), programs)
    if bucket:
        programs.close()
    np.testing.assert_allclose(compiled(np.zeros(3, np.float32)), 1)
    return found


def test_a_program_is_compiled_once_for_all_machines(server, machine):
    machine("first")
    assert [start(), start()] == [Origin.COMPILER, Origin.MACHINE]
    second = machine("second")
    assert not second.exists() and [start(), start()] == [Origin.BUCKET, Origin.MACHINE]
    assert len(server.writes) == 1
    # A program for other flags of XLA has another key.
    assert start({"xla_cpu_enable_fast_math": True}) is Origin.COMPILER
    assert len(server.names("bucket/run/programs/")) == 2


def test_what_only_the_machine_has_is_sent(server, machine):
    machine("first")
    assert [start(bucket=False), start(bucket=False)] == [Origin.COMPILER, Origin.MACHINE]
    assert server.requests == []
    for _ in range(2):
        start()  # by a key without the folder
    server.objects.clear()
    assert start() is Origin.MACHINE and len(server.objects) == 1


def test_one_that_is_whole_but_cannot_be_loaded_is_replaced(server, machine):
    machine("first")
    start()
    (name,) = server.objects
    useless = b"of another compiler"
    server.put(name, hashlib.sha256(useless).hexdigest().encode() + useless)
    machine("second")
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        assert start() is Origin.COMPILER
    machine("third")
    assert start() is Origin.BUCKET


def test_where_jax_keeps_no_programs_nothing_is_asked(server, machine):
    machine(None)
    assert start() is Origin.COMPILER
    assert server.requests == [] and server.objects == {}


def test_a_bucket_that_fails_costs_the_compile(server, machine):
    machine("first")
    start()
    server.refused, server.buckets = "programs", set()  # nor is there anything to read
    machine("second")
    assert start() is Origin.COMPILER
