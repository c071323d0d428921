"""Eight CPU devices in each test process, compiled programs kept between runs."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(REPOSITORY / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

import jax  # noqa: E402  (reads the environment above)
import pytest  # noqa: E402

from tests.support.bucket_server import serving  # noqa: E402
from tests.support.launch_standins import Laptop  # noqa: E402


@pytest.fixture(autouse=True)
def float32_again():
    """A float64 run switches 64-bit arrays on for its process; each test begins without."""
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def server(monkeypatch):
    """An empty bucket of the name "bucket"."""
    with serving("bucket", monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What `laptop` is, as its module's tests leave it."""
    return Laptop(tmp_path_factory.mktemp("laptop"))


@pytest.fixture
def laptop(checkout):
    """A checkout with launch/ in it, whose stand-ins for a cloud's programs know no rules yet."""
    checkout.rules([])
    return checkout
