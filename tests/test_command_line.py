"""The programs as a user starts them: settings, mistakes in one line, a quiet terminal."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

from bigbatch import schedule
from bigbatch.mistake import Mistake
from bigbatch.storage import checkpoint
from tests.conftest import REPOSITORY
from tests.support import started

CIFAR = "--config=configs/cifar10.py:increase"


def start(*command):
    return subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, text=True, capture_output=True, timeout=240,
        env=os.environ | {"XLA_FLAGS": ""},  # one device
    )


# Imports take most of a start, so many share them: each program runs in a fork, from its first line
# on, with a command line, an output and an exit status of its own.
FORKS = """
import json, os, runpy, sys, warnings
import bigbatch.planning.slices, bigbatch.train, clu.parameter_overview
for line in sys.stdin:
    folder, onto, program, *arguments = json.loads(line)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's, about its threads, of which it has none yet
        process = os.fork()
    if process == 0:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            if onto.get(name) == "closed pipe":
                reader, opened = os.pipe()
                os.close(reader)
            else:
                opened = os.open(onto.get(name, f"{folder}/{name}"), os.O_CREAT | os.O_RDWR)
            os.dup2(opened, number)
        sys.argv = [program, *arguments]
        run = runpy.run_path if program.endswith(".py") else runpy.run_module
        run(program, run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def start_forked(tmp_path_factory):
    """Runs a module, as `python -m` would, or a file; `onto` is where an output goes instead."""
    with subprocess.Popen(
        [sys.executable, "-c", FORKS], cwd=REPOSITORY, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, env=os.environ | {"XLA_FLAGS": ""},
    ) as forks:

        def run(*command, **onto):
            folder = tmp_path_factory.mktemp("output")
            forks.stdin.write(json.dumps([str(folder), onto, *command]) + "\n")
            forks.stdin.flush()
            status = int(forks.stdout.readline())
            return subprocess.CompletedProcess(
                command, status, *("" if name in onto else (folder / name).read_text()
                                   for name in ("stdout", "stderr")))

        yield run
        forks.stdin.close()


MISTAKES = [
    # (arguments of plan, what the one line must hold)
    ([], ("--config is missing", "came cifar10.py, digits.py,", "--config=digits.py:increase")),
    (["--config=configs/cifra10.py:increase"],
     ("'configs/cifra10.py'", "no such Python file", "came cifar10.py, digits.py,")),
    (["--config=elsewhere/cifar10.py"], ("'elsewhere/cifar10.py'", "no such Python file")),
    (["--config=README.md"], ("'README.md'", "no such Python file")),
    (["--config=configs/cifar10.py:incraese"], ("preset 'incraese' is unknown", "increase,")),
    ([CIFAR, "--config.sede=3"], ("config.sede is unknown", "did you mean seed?")),
    ([CIFAR, "--config.seed=x"], ("config.seed takes a whole number", "'x'")),
    ([CIFAR, "--config.seed="], ("config.seed takes a whole number", "''")),
    ([CIFAR, "--config.init_from"], ("--config.init_from has no value; write",)),
    (["--config.data.dir", CIFAR], ("--config.data.dir has no value",)),
    ([CIFAR, "--config.recipe.falls=(60,5)"], ("recipe.falls is (60, 5)", "pairs")),
    ([CIFAR, "--config.model.depth=7"], ("model.depth is 7", "10, 16, 22")),
    ([CIFAR, "stray"], ("'stray' is no flag", "--config.key=value")),
    ([CIFAR, "--confg.seed=3"], ("confg.seed",)),
    ([CIFAR, "--devices=0"], ("--devices=0",)),
]


def test_a_mistake_is_one_line_and_status_2(start_forked):
    for arguments, parts in MISTAKES:
        done = start_forked("bigbatch.plan", *arguments)
        said = f"{arguments}: {done.stderr}"
        assert (done.returncode, done.stdout) == (2, ""), said
        assert done.stderr.startswith("bigbatch: "), said
        assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), said
        for part in parts:
            assert part in done.stderr, said


def test_settings_count_wherever_they_stand(start_forked):
    for arguments in (
        [CIFAR, "--config.recipe.falls=((60,5),(120,5))", "--config.limits.max_batch_size=640"],
        ["--config.recipe.falls=((60,5),(120,5))", CIFAR + ",limits.max_batch_size=640"],
        ["--config.limits.max_batch_size", "640", "--config",
         "configs/cifar10.py:increase,recipe.falls=((60,5),(120,5)),limits.max_batch_size=5120"],
    ):
        done = start_forked("bigbatch.plan", "--format=json", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        batches = [phase["batch_size"] for phase in json.loads(done.stdout)["phases"]]
        assert batches == [128, 640, 640]


def test_help_shows_the_config_flag():
    done = start("-m", "bigbatch.plan", "--help")
    assert "--config: file.py:preset,key=value" in done.stdout
    assert "--devices" in done.stdout and "--format" in done.stdout


def test_main_refuses_before_it_writes(start_forked, tmp_path):
    workdir = tmp_path / "run"
    digits = "--config=configs/digits.py:increase"
    mistakes = [
        ([digits], "--workdir is missing"),
        ([digits, "--config.model.depth=7", f"--workdir={workdir}"], "model.depth is 7"),
        ([digits, "--config.limits.max_batch_size=100", f"--workdir={workdir}"], "is 100"),
        ([digits, "--stop_after_phase=noise/5", f"--workdir={workdir}"], "noise/3"),
    ]
    for arguments, part in mistakes:
        ended = start_forked("bigbatch.main", "--compilation_cache=", *arguments)
        said = f"{arguments}: {ended.stderr}"
        assert (ended.returncode, ended.stdout) == (2, ""), said
        assert ended.stderr.count("\n") == 1 and part in ended.stderr, said
    assert not workdir.exists()


def test_what_cannot_be_branched_is_one_line(start_forked, tmp_path):
    run = f"--workdir={tmp_path / 'run'}"
    for arguments, part in (
        (["--for=1"], "--workdir is missing"),
        ([run], "--for is missing"),
        ([run, "--for=1", "--factors=2,x"], "--factors is 2,x; it must have whole numbers"),
        ([run, "--for=1"], "has no checkpoint: no run was made there"),
    ):
        ended = start_forked("bigbatch.branch", "--compilation_cache=", *arguments)
        assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
        assert ended.stderr.count("\n") == 1 and part in ended.stderr
    assert not list(tmp_path.iterdir())


BROKEN = ("/dev/full", "closed pipe")


def test_an_output_that_breaks_changes_no_status(start_forked, tmp_path):
    """As `| head`, a closed terminal and a full disk break it."""
    for stderr in BROKEN:
        refused = start_forked("bigbatch.main", "--compilation_cache=", stderr=stderr)
        assert refused.returncode == 2, stderr
    for stdout, status in (("closed pipe", 0), ("/dev/full", 2)):
        planned = start_forked("bigbatch.plan", CIFAR, stdout=stdout)
        assert planned.returncode == status, planned.stderr
        assert ("No space left on device" in planned.stderr) == bool(status)
        assert planned.stderr.count("\n") == bool(status), planned.stderr
    nowhere = start_forked("bigbatch.plan", stdout="closed pipe", stderr="closed pipe")
    assert nowhere.returncode == 2


@pytest.mark.parametrize("stderr", BROKEN)
def test_a_run_goes_on_where_nobody_can_watch_it(tmp_path, stderr):
    reader, writer = os.pipe()
    os.close(reader)
    with (open("/dev/full", "w") if stderr == "/dev/full" else open(writer, "w")) as broken:
        done = subprocess.run(
            [sys.executable, "-m", "bigbatch.main", f"--compilation_cache={started.CACHE}",
             f"--workdir={tmp_path}", "--config=tests/support/small_config.py:resident"],
            cwd=REPOSITORY, env=os.environ | {"XLA_FLAGS": ""}, stderr=broken, stdout=broken,
            check=False, timeout=240)
    assert done.returncode == 0
    assert checkpoint.find_newest(tmp_path).run["updates"] == 9
    assert checkpoint.load(tmp_path)["params"]
    if stderr == "/dev/full":
        return
    at = int(checkpoint.finished(tmp_path)[0].name)
    done = start("-m", "bigbatch.evaluate", f"--workdir={tmp_path}", f"--at={at}")
    assert json.loads(done.stdout)["examples_seen"] == at, done.stderr
    done = start("-m", "bigbatch.evaluate", f"--workdir={tmp_path}", "--at=1")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and f"at {at}, " in done.stderr


def test_a_run_shows_its_own_lines_and_nothing_of_its_libraries(tmp_path):
    done = start(
        "-m", "bigbatch.main", f"--compilation_cache={started.CACHE}", f"--workdir={tmp_path}",
        "--config=configs/digits.py:decay,strategy=constant,recipe.epochs=0.02",
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "finished" in done.stderr
    # As absl begins a line: I1124 for INFO.
    assert not re.search(r"^[IWEF]\d{4} ", done.stderr, re.MULTILINE), done.stderr


LOGGING = """
from absl import logging
from bigbatch import command_line
def main(arguments):
    logging.info("said at INFO")
    logging.warning("said at WARNING")
command_line.run(main)
"""


def test_the_user_may_ask_for_more_or_less(start_forked, tmp_path):
    program = tmp_path / "logging_program.py"
    program.write_text(LOGGING)
    quiet, asked, silent = (
        start_forked(str(program), *more) for more in ([], ["--verbosity=0"], ["--verbosity=-2"])
    )
    assert "INFO" not in quiet.stderr and "said at WARNING" in quiet.stderr
    assert "said at INFO" in asked.stderr and "said at WARNING" in asked.stderr
    assert silent.stderr == ""


BROKEN_CONFIG = """
from bigbatch.config import base_config, from_argument
def get_config(argument=""):
    config = base_config()
    config.data.update({"train_examples": 1000, "test_examples": int("sizes")})
    return from_argument(config, argument, {"only": {}})
"""


def test_an_error_in_a_users_own_file_keeps_its_traceback(start_forked, tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(BROKEN_CONFIG)
    done = start_forked("bigbatch.plan", f"--config={path}:only")
    assert done.returncode == 1
    assert f'{path}", line 5' in done.stderr and "sizes" in done.stderr


def test_only_what_the_package_raises_on_purpose_is_a_users_mistake():
    recipe = schedule.Recipe(0.1, 128, 0.9, 50_000, 10)
    with pytest.raises(Mistake):
        schedule.plan_phases(recipe, "grow", schedule.Limits())
    # Python's own error, raised while a line of the package runs, is a bug of the package.
    with pytest.raises(TypeError):
        schedule.plan_phases(
            dataclasses.replace(recipe, batch_size="many"), "decay", schedule.Limits())


def test_a_start_imports_no_tensorboard_unasked():
    """Where PyTorch is installed tensorboardX imports it, for seconds."""
    said = start("-c", "import bigbatch.main, sys; print('tensorboardX' in sys.modules)")
    assert said.stdout == "False\n", said.stderr


def test_a_program_collects_garbage_once_all_is_imported_but_not_of_what_was():
    """Whether or not it did not while it imported, as `bigbatch.main` does not."""
    for begun in ("enable", "disable"):
        done = start("-c", f"import gc; gc.{begun}(); from bigbatch import command_line; "
                     "command_line.run(lambda _: print(gc.isenabled(), gc.get_freeze_count()))")
        enabled, frozen = done.stdout.split()
        assert enabled == "True" and int(frozen) > 10_000, done.stdout
