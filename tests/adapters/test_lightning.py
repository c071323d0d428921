"""A table in Lightning's Trainer: automatic optimisation, its own checkpoints."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; make test-adapters")
lightning = pytest.importorskip(
    "lightning.pytorch", reason="lightning is not installed; make test-adapters")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from bigbatch.adapters.lightning import ScheduledData, configured  # noqa: E402
from bigbatch.mistake import Mistake  # noqa: E402
from tests.adapters import tables, torch_task  # noqa: E402
from tests.adapters.tables import MICRO_BATCH, ORDER, TABLES  # noqa: E402


class Net(lightning.LightningModule):
    """The task, with Lightning's automatic optimisation."""

    def __init__(self, table, record):
        super().__init__()
        self.table, self.record, self.net = table, record, torch_task.Linear()

    def training_step(self, batch):
        self.record.see(batch["index"])
        return torch.nn.functional.mse_loss(self.net(batch["features"]), batch["labels"])

    def configure_optimizers(self):
        optimizer = torch_task.make_optimizer(self.table, self.parameters())
        self.record.watch(optimizer)
        return configured(optimizer, self.table)


class PlainNet(Net):
    """Without the table's rates."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02)


class KilledError(Exception):
    """In place of a signal."""


class KillAfter(lightning.Callback):
    """Ends the process in the midst of the update after a number of them."""

    def __init__(self, updates):
        self.updates = updates

    def on_before_zero_grad(self, trainer, module, optimizer):
        if trainer.global_step == self.updates and module.record.examples:
            raise KilledError


def fit(table, record, keep, stop=None, saved=None, net=Net, validate=False, **changed):
    """A user's training, with a checkpoint callback; returns the module."""
    options = {"max_epochs": len(table.phases), "reload_dataloaders_every_n_epochs": 1,
               "enable_checkpointing": isinstance(keep, ModelCheckpoint), **changed}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[keep, KillAfter(stop)], **options)
    module = net(table, record)
    data = ScheduledData(torch_task.Examples(), table, ORDER, MICRO_BATCH)
    if validate:
        data.val_dataloader = lambda: torch.utils.data.DataLoader(torch_task.Examples())
    trainer.fit(module, data, ckpt_path=saved)
    return module


@pytest.mark.parametrize("name", TABLES)
def test_a_fit_stopped_anywhere_and_continued_consumes_the_table(name, tmp_path, recwarn):
    table = TABLES[name]
    for stop in tables.stops(table):
        record = torch_task.Recorder()
        with pytest.raises(KilledError):
            fit(table, record, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop), stop)
        assert len(record.taken) == stop and record.examples
        record.examples = []
        module = fit(table, record, ModelCheckpoint(tmp_path, every_n_train_steps=1000),
                     saved=tmp_path / f"step={stop}.ckpt")
        assert record.taken == tables.wanted(table)
        np.testing.assert_allclose(
            torch_task.array(module.net), tables.weights_after(table, record.taken), rtol=1e-12)
    assert not [one for one in recwarn if "not resumable" in str(one.message)]


def test_a_checkpoint_of_a_whole_phase_is_continued(tmp_path):
    table, record = TABLES["sgd"], torch_task.Recorder()
    end = table.phases[0].updates
    with pytest.raises(KilledError):
        fit(table, record, ModelCheckpoint(tmp_path, "{step}", save_on_train_epoch_end=True), end)
    record.examples = []
    fit(table, record, ModelCheckpoint(tmp_path), saved=tmp_path / f"step={end}.ckpt")
    assert record.taken == tables.wanted(table)


def test_a_checkpoint_from_within_an_update_is_refused(tmp_path):
    within = TABLES["sgd"].phases[2].start_update + 2

    class KeepWithin(lightning.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            if trainer.global_step == within:  # one micro-batch of this update has been seen
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    table, record = TABLES["sgd"], torch_task.Recorder()
    fit(table, record, KeepWithin())
    with pytest.raises(Mistake, match="taken within an update, after 1 micro-batches"):
        fit(table, record, ModelCheckpoint(tmp_path), saved=tmp_path / "within.ckpt")


def test_validation_comes_in_between(tmp_path):
    class Validated(Net):
        validations = 0

        def validation_step(self, batch):
            pass

        def on_validation_epoch_end(self):
            self.validations += 1

    table, record = TABLES["sgd"], torch_task.Recorder()
    module = fit(table, record, ModelCheckpoint(tmp_path), net=Validated, validate=True,
                 val_check_interval=10, check_val_every_n_epoch=None, num_sanity_val_steps=0)
    assert record.taken == tables.wanted(table)
    assert module.validations == table.examples // MICRO_BATCH // 10


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(lightning.Trainer, "world_size", property(lambda _: 2))
    with pytest.raises(Mistake, match="ScheduledData runs in one process"):
        fit(TABLES["sgd"], torch_task.Recorder(), ModelCheckpoint(tmp_path))


def test_what_does_not_fit_is_refused(tmp_path):
    table = TABLES["sgd"]

    def refused(text, **changed):
        with pytest.raises(Mistake, match=text):
            fit(table, torch_task.Recorder(), ModelCheckpoint(tmp_path), **changed)

    refused("max_epochs=4 and reload_dataloaders_every_n_epochs=1", max_epochs=6)
    refused("reload_dataloaders_every_n_epochs=1", reload_dataloaders_every_n_epochs=0)
    refused("the table's rates are not in use", net=PlainNet)
    with pytest.raises(Mistake, match=r"no multiple of the micro-batch of 3"):
        ScheduledData(torch_task.Examples(), table, ORDER, micro_batch=3)
    with pytest.raises(Mistake, match="set has 49 examples, and recipe.examples is 50"):
        ScheduledData([None] * 49, table, ORDER, MICRO_BATCH)
