"""The rooms of the package: what each may import, and how long a function may be."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bigbatch"
# A file of a room, or one on top, imports from its own line and from lines further down.
ORDER = [
    {"commands", "main", "plan", "evaluate", "export", "branch", "adapters"},
    {"train"},
    {"loop"},
    {"checkpoint", "command_line", "planning", "branching"},
    {"programs"},
    {"update"},
    {"tasks"},
    {"data"},
    {"watching"},
    {"storage"},
    {"job"},
    {"config_files"},
    {"config", "adapters"},
    {"schedule", "models", "dotted"},
    {"mistake", "__init__"},
]
# These run where JAX is not installed, or are read by programs that need nothing but Python.
PLAIN = {
    **{file.relative_to(PACKAGE).as_posix(): set() for file in PACKAGE.glob("schedule/*.py")},
    "schedule/layout.py": {"numpy"}, "schedule/order.py": {"numpy"},
    "adapters/__init__.py": set(), "adapters/batches.py": set(),
    "job/statuses.py": set(), "job/signals.py": set(),
    "job/chips.py": set(), "job/__init__.py": set(), "mistake.py": set(),
    "__init__.py": set()}
# Each adapter needs its own framework and no other library; Lightning and the Trainer need PyTorch.
FRAMEWORKS = {"pytorch": {"torch"}, "huggingface": {"torch", "transformers"},
              "lightning": {"torch", "lightning"}, "optax": {"jax", "numpy"}}
LINES_AT_MOST = 100

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """The room, or the file on top, of a module of the package."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(file: Path) -> list[str]:
    """All modules that a file imports, in functions too; of `from bigbatch import x` x as well."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports by a relative path"
            if node.module == "bigbatch":
                found += [f"bigbatch.{alias.name}" for alias in node.names]
            else:
                found.append(node.module)
    return found


def level(room: str) -> int:
    return next(place for place, rooms in enumerate(ORDER) if room in rooms)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_imports_only_from_itself_and_from_rooms_below(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module in imports(file):
        if module.split(".")[0] != "bigbatch":
            continue
        other = room_of(module)
        if other == "__version__" or other == own:
            continue
        assert level(other) > level(own), f"{file} imports {module}"


def test_every_room_has_a_place_and_three_files_or_more():
    rooms = {file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in FILES}
    assert rooms == set().union(*ORDER)
    for room in filter(lambda room: (PACKAGE / room).is_dir(), rooms):
        inside = [file for file in (PACKAGE / room).glob("*.py") if file.name != "__init__.py"]
        assert len(inside) >= 3, room


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_plain_python_needs_no_library(name):
    found = {module.split(".")[0] for module in imports(PACKAGE / name)}
    assert found - {"bigbatch"} - sys.stdlib_module_names == PLAIN[name]


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_adapter_needs_its_framework_the_schedule_and_nothing_else(name):
    found = imports(PACKAGE / "adapters" / f"{name}.py")
    libraries = {module.split(".")[0] for module in found} - {"bigbatch"} - sys.stdlib_module_names
    assert libraries == FRAMEWORKS[name]
    rooms = {room_of(module) for module in found if module.startswith("bigbatch")}
    assert rooms <= {"schedule", "adapters", "mistake"}


def test_one_file_touches_what_is_private_in_jax():
    users = [file.relative_to(PACKAGE).as_posix() for file in FILES
             if any("._src" in module or module.startswith("jaxlib") for module in imports(file))]
    assert users == ["job/jax_private.py"]


def test_no_function_is_longer_than_a_hundred_lines_and_none_writes_to_anothers_names():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LINES_AT_MOST, f"{file}: {node.name} has {lines} lines"
            assert not isinstance(node, ast.Nonlocal), f"{file}:{node.lineno}"
