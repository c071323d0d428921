"""Where the tests find real CIFAR-10 and ImageNet images, and the reason they skip without them."""

import os
from pathlib import Path

import pytest

FOLDER = Path(
    os.environ.get("BIGBATCH_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")
)


def data_dir(name: str) -> str:
    """The TFDS data_dir holding `name` (`cifar10` or `imagenet2012`); skips where there is none."""
    folder = FOLDER / {"cifar10": "cifar10_jpeg", "imagenet2012": "imagenet_sample"}[name]
    if not (folder / name).is_dir():
        pytest.skip(f"needs {name} as ArrayRecord files in {folder} (see BIGBATCH_TEST_DATA)")
    return str(folder)
