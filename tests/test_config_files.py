"""Where a config is looked for: a path that exists, else among those that came along."""

import pytest

from bigbatch.config import make_phases, saved_config
from bigbatch.config_files import CONFIGS, load_config, load_file
from bigbatch.dotted import resolve
from bigbatch.mistake import Mistake

OWN = "def get_config(argument):\n    return ('own', argument)\n"


def test_the_configs_that_came_along_need_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits.py", "configs/digits.py", str(CONFIGS / "digits.py")):
        assert load_config(f"{name}:increase,seed=3").seed == 3


def test_a_path_that_exists_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("digits.py", "configs/cifar10.py"):
        (tmp_path / name).write_text(OWN)
        assert load_config(f"{name}:a,b=c") == ("own", "a,b=c")
    monkeypatch.chdir("/")
    assert load_config("digits.py:a", tmp_path) == ("own", "a")


@pytest.mark.parametrize("name", ["elsewhere/digits.py", "/digits.py", "../configs/digits.py",
                                  "digits", "configs", ""])
def test_nothing_else_names_one_of_them(name, tmp_path, monkeypatch):
    """A slip in a path of one's own trains no other config."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Mistake) as refused:
        load_file(name)
    assert (f"{name!r}, and there is no such Python file; with bigbatch came cifar10.py, digits.py,"
            in str(refused.value))


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.py")), ids=lambda file: file.stem)
def test_each_is_a_config_in_any_folder(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = load_file(file.name)
    for preset in module.PRESETS:
        config = module.get_config(preset)
        assert make_phases(config)
        assert config.network.startswith("bigbatch.")


@pytest.mark.parametrize("name", ["half_resolution", "some_digits"])
def test_a_run_of_the_small_config_names_its_data_by_the_place_of_now(name):
    saved = saved_config({"config": {"data": {"name": f"configs.small.{name}"}}})
    assert saved.data.name == f"bigbatch.data.smaller.{name}"
    assert callable(resolve(saved.data.name, "config.data.name"))


WITH_A_LINE = """
from bigbatch.config import base_config, from_argument
from ml_collections import ConfigDict
def get_config(argument=""):
    config = base_config()
    {line}
    return from_argument(config, argument, {{"only": {{}}}})
"""


@pytest.mark.parametrize(("line", "parts"), [
    ("config.data.my_key = 3", (
        "config.data.my_key is unknown", "of your own is config.data.options.my_key.")),
    ("config.data.update({'seed': 1, 'sizes': 3})", ("config.data.seed is unknown",)),
    ("config.data.augment['flips'] = True", (
        "config.data.augment.flips is unknown (did you mean data.augment.flip?);",)),
    ("config.recipe.foo = 1", ("config.recipe.foo is unknown; config.recipe has ",)),
    ("config.recipe.eppochs = 1", ("did you mean recipe.epochs?",)),
    ("config.epochs = 1", ("config.epochs is unknown (did you mean recipe.epochs?)",)),
    ("config.batch = config.recipe.batch", ("config.recipe.batch is unknown",)),
    ("config.seed = 'one'", ("config.seed takes a whole number (it is 0), not 'one'.",)),
    ("config.recipe.falls = 5", ("config.recipe.falls takes a tuple in brackets (it is ()), not",)),
])
def test_a_key_that_there_is_not_is_named_with_the_line_that_set_it(tmp_path, line, parts):
    file = tmp_path / "own.py"
    file.write_text(WITH_A_LINE.format(line=line))
    with pytest.raises(Mistake) as refused:
        load_config(str(file))
    told = str(refused.value)
    assert told.startswith(f"{file}:6: ") and "\n" not in told
    for part in parts:
        assert part in told


@pytest.mark.parametrize(("line", "error"), [
    ("{}['missing']", KeyError), ("file.name", NameError), ("argument.name", AttributeError),
    ("ConfigDict({'a': 1}).b", AttributeError), ("len(3)", TypeError)])
def test_other_errors_of_a_config_file_are_its_own(tmp_path, line, error):
    file = tmp_path / "own.py"
    file.write_text(WITH_A_LINE.format(line=line))
    with pytest.raises(error) as raised:
        load_config(str(file))
    assert not isinstance(raised.value, Mistake)
