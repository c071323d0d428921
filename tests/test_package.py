"""The package as `pip install .` makes it: whole, and asking for what it imports and no more."""

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path
from typing import NamedTuple

import pytest

from bigbatch import __version__
from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# TFDS reads ArrayRecord files with the first, and what a plan prints is tables.
NOT_IMPORTED = {"array-record", "tabulate"}
# A model that is in the folder one works in, and nowhere else.
OWN_MODEL = "from bigbatch.models.wide_resnet import WideResNet as Own\n"


class Installed(NamedTuple):
    """The wheel, in an environment of its own that has only the libraries of this one."""

    bin: Path

    def run(self, command: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
        """A command of the environment, started in `folder`."""
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(
            [self.bin / command, *arguments], cwd=folder, text=True, capture_output=True,
            timeout=240, env=environment | {"XLA_FLAGS": ""})


PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    root = tmp_path_factory.mktemp("wheel")
    source = root / "source"  # so that the checkout gets no build/
    for name in ("bigbatch", "configs"):
        shutil.copytree(REPOSITORY / name, source / name,
                        ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    subprocess.run([*PIP, "wheel", "--no-index", "--no-deps", "--no-build-isolation",
                    "--wheel-dir", root, source], check=True)
    made, = root.glob("bigbatch-*.whl")
    return made


def install(wheel: Path, root: Path, libraries: bool) -> Installed:
    """Installs the wheel in a new environment, which has this one's libraries or none at all."""
    venv.create(root / "environment", with_pip=False)
    made = Installed(root / "environment" / "bin")
    if libraries:
        found = made.run("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
                         folder=root)
        Path(found.stdout.strip(), "libraries.pth").write_text(
            sysconfig.get_path("purelib") + "\n")
    before = made.run("python", "-c", "import jax, bigbatch" if libraries else "import bigbatch",
                      folder=root)
    assert "No module named 'bigbatch'" in before.stderr
    subprocess.run([*PIP, "--python", made.bin / "python", "install", "--no-index", "--no-deps",
                    wheel], check=True)
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    return install(wheel, tmp_path_factory.mktemp("package"), libraries=True)


def test_the_commands_train_and_evaluate_in_another_folder(installed, tmp_path):
    trained = installed.run(
        "bigbatch", "--config=digits.py:decay,strategy=constant,recipe.epochs=0.1",
        "--workdir=run", "--compilation_cache=", folder=tmp_path)
    assert (trained.returncode, trained.stdout) == (0, ""), trained.stderr
    assert "finished: 9 updates" in trained.stderr
    evaluated = installed.run("bigbatch-evaluate", "--workdir=run", folder=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    found = json.loads(evaluated.stdout)
    assert found["updates"] == last["updates"] == 9
    assert found["test_accuracy"] == pytest.approx(last["test_accuracy"])
    written = installed.run(
        "bigbatch-export", "--workdir=run", "--output=net.npz", folder=tmp_path)
    assert written.returncode == 0, written.stderr
    assert json.loads(written.stdout)["bytes"] == (tmp_path / "net.npz").stat().st_size


def test_a_plan_and_what_is_in_the_folder_one_works_in(installed, tmp_path):
    (tmp_path / "own.py").write_text(OWN_MODEL)
    planned = installed.run(
        "bigbatch-plan", "--config=configs/small.py:increase,data=digits", "--format=json",
        "--config.network=own.Own", folder=tmp_path)
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["total_updates"] == 2368


def test_the_commands_say_what_python_m_says(installed, tmp_path):
    wrong = installed.run("bigbatch", "--config=digit.py", "--workdir=run", folder=tmp_path)
    assert (wrong.returncode, wrong.stdout) == (2, ""), wrong.stderr
    names = ", ".join(sorted(file.name for file in (REPOSITORY / "configs").glob("*.py")))
    assert f"'digit.py', and there is no such Python file; with bigbatch came {names};" in (
        wrong.stderr)
    assert wrong.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
    told = installed.run("bigbatch-evaluate", "--help", folder=tmp_path).stdout
    assert "Evaluates a run's last checkpoint" in told and "--data_dir" in told


SCHEDULE_ALONE = """
import sys
from bigbatch import schedule
recipe = schedule.Recipe(learning_rate=0.1, batch_size=128, momentum=0.9, examples=50000,
                         epochs=204.8, falls=((60, 5), (120, 5), (160, 5)))
table = schedule.make_table(recipe, "increase", schedule.Limits(max_batch_size=5120))
print(table.updates, schedule.row(table, table.updates - 1).batch_size)
from bigbatch.adapters import batches
print(*{name.split(".")[0] for name in sys.modules} - sys.stdlib_module_names - {"__main__"})
"""


def test_the_schedule_needs_nothing_but_python(wheel, tmp_path):
    alone = install(wheel, tmp_path, libraries=False)
    said = alone.run("python", "-I", "-c", SCHEDULE_ALONE, folder=tmp_path)
    assert said.stdout.split() == ["29189", "5120", "bigbatch"], said.stderr


def test_the_version_is_stated_once(installed, tmp_path):
    said = installed.run("python", "-c", "import bigbatch; print(bigbatch.__version__)",
                         folder=tmp_path)
    assert said.stdout.strip() == __version__
    assert list(installed.bin.parent.rglob(f"bigbatch-{__version__}.dist-info"))
    assert f"\nversion: {__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()


def test_the_package_asks_for_what_it_imports_and_no_more():
    imported = set()
    for file in [*REPOSITORY.glob("bigbatch/**/*.py"), *REPOSITORY.glob("configs/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    libraries = imported - sys.stdlib_module_names - {"bigbatch"}
    distributions = importlib.metadata.packages_distributions()
    # The extra gcs is gcsfs, which brings aiohttp; matplotlib is of the extra plots.
    in_extras = {"gcsfs", "aiohttp", "matplotlib", "tokenizers", *map(name_of, EXTRAS["adapters"])}
    asked = {name_of(line) for line in PROJECT["dependencies"]}
    for library in libraries - in_extras:
        assert asked & {normal(name) for name in distributions[library]}, library
    given = {normal(name) for library in libraries for name in distributions.get(library, [])}
    assert asked - given <= NOT_IMPORTED


def test_one_bound_a_library_wherever_it_is_stated():
    checkout, tpu, adapters = (
        [line.partition("#")[0].strip() for line in
         (REPOSITORY / name).read_text(encoding="utf-8").splitlines()]
        for name in ("requirements.txt", "requirements-tpu.txt", "requirements-adapters.txt"))
    testing = [line for line in EXTRAS["test"] if line != "bigbatch[gcs,plots,export]"]
    asked = {*PROJECT["dependencies"], *testing, *EXTRAS["gcs"], *EXTRAS["plots"],
             *EXTRAS["export"]}
    assert {*filter(None, checkout)} == asked
    assert [*filter(None, tpu)] == EXTRAS["tpu"]
    for_tests = {line for line in asked if name_of(line) in ("numpy", "pytest")}
    assert {*filter(None, adapters)} == {*EXTRAS["adapters"], *for_tests}
    bounds = {}
    for line in [*asked, *EXTRAS["tpu"], *EXTRAS["gpu"], *EXTRAS["adapters"]]:
        bounds.setdefault(name_of(line), set()).add(line.partition(">=")[2])
    assert all(len(stated) == 1 for stated in bounds.values()), bounds


def name_of(line: str) -> str:
    """The library of a requirement."""
    return normal(re.match(r"[\w.-]+", line)[0])


def normal(name: str) -> str:
    """As the registry compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()
