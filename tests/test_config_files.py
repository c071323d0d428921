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
