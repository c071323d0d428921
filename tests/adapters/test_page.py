"""The code on docs/adapters.md runs as it stands there, with a small table."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.adapters import tables
from tests.adapters.tables import ADAM, MICRO_BATCH, ORDER, TABLES

PAGE = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text(encoding="utf-8")
CODE = {title: code for title, code in re.findall(
    r"^## (.+?)\n\n```python\n(.+?)```", PAGE, flags=re.DOTALL | re.MULTILINE)}


def names(folder):
    """What the page's reader has: a recipe, an order, a place for checkpoints, nothing saved."""
    return {"recipe": ADAM, "table": TABLES["adam"], "order": ORDER, "micro_batch": MICRO_BATCH,
            "folder": str(folder), "save_steps": 20, "saved": None, "last_checkpoint": None}


def torch_names(folder):
    torch = pytest.importorskip("torch", reason="torch is not installed; make test-adapters")
    from tests.adapters import torch_task

    def loss_of(model, batch):
        return torch.nn.functional.mse_loss(model(batch["features"]), batch["labels"])

    return {**names(folder), "torch": torch, "DataLoader": torch.utils.data.DataLoader,
            "dataset": torch_task.Examples(), "model": torch_task.Linear(), "loss_of": loss_of}


def check(weights, rtol=1e-12):
    table = TABLES["adam"]
    np.testing.assert_allclose(
        weights, tables.weights_after(table, tables.wanted(table)), rtol=rtol)


def test_the_first_blocks_make_a_table_and_an_order():
    first, second = re.findall(r"```python\n(.+?)```", PAGE, flags=re.DOTALL)[:2]
    made = {}
    exec(first.partition("for row in")[0] + second, made)
    batches = [phase.batch_size for phase in made["table"].phases]
    assert batches == [256, 256, 512, 1024, 2048]  # the first is the warm-up
    assert sorted(made["order"](3)) == list(range(100_000))


def test_pytorch(tmp_path):
    made = torch_names(tmp_path)
    exec(CODE["PyTorch"], made)
    check(made["model"].weights.detach().numpy())
    made["model"] = type(made["model"])()
    exec(CODE["PyTorch"], made)  # from what the end has saved, there is no update more
    check(made["model"].weights.detach().numpy())


def test_hugging_face(tmp_path):
    made = torch_names(tmp_path)
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed; make test-adapters")
    from tests.adapters.test_huggingface import MeanLoss
    from tests.adapters.torch_task import Recorder

    record = Recorder()
    made |= {"transformers": transformers, "model": MeanLoss(record)}
    exec(CODE["Hugging Face Trainer"], made)
    assert made["trainer"].state.global_step == TABLES["adam"].updates
    wanted = [example for update in tables.wanted(TABLES["adam"]) for example in update.examples]
    assert record.examples == wanted


def test_lightning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where Lightning writes its logs
    made = torch_names(tmp_path)
    lightning = pytest.importorskip(
        "lightning.pytorch", reason="lightning is not installed; make test-adapters")
    made |= {"lightning": lightning, "ModelCheckpoint": lightning.callbacks.ModelCheckpoint}
    exec(CODE["Lightning"], made)
    check(made["model"].weights.detach().numpy())


@pytest.mark.slow  # test_optax.py has the short form
def test_optax(tmp_path):
    jax = pytest.importorskip("jax", reason="jax is not installed")
    optax = pytest.importorskip("optax", reason="optax is not installed")
    jax.config.update("jax_enable_x64", True)
    made = {**names(tmp_path), "optax": optax, "params": jax.numpy.zeros(3)}

    def step(params, state, start):
        epoch, place = np.divmod(np.arange(start, start + MICRO_BATCH), tables.EXAMPLES)
        rows = [ORDER(int(one))[other] for one, other in zip(epoch, place, strict=True)]
        features, targets = tables.FEATURES[rows], tables.TARGETS[rows]
        gradient = jax.grad(lambda weights: ((features @ weights - targets) ** 2).mean())(params)
        changes, state = made["optimizer"].update(gradient, state, params)
        return optax.apply_updates(params, changes), state

    made["step"] = step
    exec(CODE["Optax"], made)
    check(made["params"], rtol=1e-5)  # MultiSteps adds up in float32


def test_tests_that_the_page_names_are_there():
    folder = Path(__file__).parents[1]
    found = "".join(file.read_text(encoding="utf-8") for file in (
        *folder.glob("adapters/test_*.py"), folder / "schedule" / "test_table.py"))
    for name in re.findall(r"`(test_\w+)`", PAGE):
        assert f"def {name}(" in found or list(folder.rglob(f"{name}.py")), name
