"""What pyproject.toml cannot say: the rooms of the package as found, and the configs among them."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["bigbatch", "bigbatch.*"]), "bigbatch.configs"],
    package_dir={"bigbatch.configs": "configs"},
)
