"""A schedule in Lightning's Trainer: each phase is one of its epochs.

`accumulate_grad_batches` can change between Lightning's epochs and not within one: when to step is
told from the number of micro-batches so far in the epoch, by a remainder. A phase has one batch
size, and it begins and ends on a whole update, so what Lightning does of itself is right.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler

from bigbatch.adapters import batches
from bigbatch.adapters.pytorch import ScheduledRates
from bigbatch.mistake import Mistake
from bigbatch.schedule import Phase, Table


def configured(optimizer: Optimizer, table: Table) -> dict[str, Any]:
    """What `configure_optimizers` returns: the optimizer, and the table's rates at each update.

    Raises:
        Mistake: see `ScheduledRates`.
    """
    rates = ScheduledRates(optimizer, table)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


class ScheduledData(LightningDataModule):
    """The training data of a table, in micro-batches of one size.

    For `Trainer(max_epochs=len(table.phases), reload_dataloaders_every_n_epochs=1)`. It sets
    `trainer.accumulate_grad_batches` at the start of each phase. Validation that shall come more
    often than once a phase is asked for by `val_check_interval` with
    `check_val_every_n_epoch=None`, in micro-batches. Checkpoints are taken by
    `ModelCheckpoint(every_n_train_steps=...)`, which counts updates.

    Args:
        dataset: of the training set.
        table: of the run.
        order: of each epoch over the training set; see `batches.Order`.
        micro_batch: the examples of a micro-batch.
        **options: of `DataLoader`, as `num_workers` and `collate_fn`.

    Raises:
        Mistake: if a batch is no multiple of the micro-batch, or the training set has another size
            than the recipe says; and when training begins, if there are several processes, or the
            Trainer or the optimizer was made without the table.
    """

    def __init__(
        self, dataset: Dataset, table: Table, order: batches.Order, micro_batch: int, **options: Any
    ) -> None:
        super().__init__()
        self.dataset, self.table, self.options = dataset, table, options
        self.order, self.micro_batch = order, micro_batch
        self.accumulations = batches.micro_batches(table, micro_batch)
        batches.check_length(dataset, table)

    def train_dataloader(self) -> DataLoader:
        """The rest of the current phase; Lightning asks for it at the start of each."""
        _check(self.trainer, self.table)
        phase = self.table.phases[self.trainer.current_epoch]
        over = self.trainer.global_step - phase.start_update
        if not 0 <= over <= phase.updates:
            raise Mistake(
                f"{self.trainer.global_step} updates have been made, and epoch {phase.index} of "
                f"Lightning is the phase of {phase.updates} updates from {phase.start_update} on; "
                "continue with the recipe, strategy and limits that the run began with."
            )
        if not over:
            # From a checkpoint at the end of a phase Lightning would go on counting micro-batches
            # where that phase, which had another number of them, has ended.
            self.trainer.fit_loop.epoch_loop.restarting = False
        self.trainer.accumulate_grad_batches = self.accumulations[phase.index]
        parts = PhaseBatches(self.table, self.order, phase, over, self.micro_batch)
        return PhaseLoader(self.trainer, self.dataset, batch_sampler=parts, **self.options)


class PhaseBatches(Sampler[list[int]]):
    """The indexes of the micro-batches of a phase, without those of its first `over` updates.

    Its length is that of the whole phase, because Lightning goes on counting where it was stopped.
    """

    def __init__(
        self, table: Table, order: batches.Order, phase: Phase, over: int, micro_batch: int
    ) -> None:
        self.examples, self.order, self.micro_batch = table.recipe.examples, order, micro_batch
        self.phase, self.start = phase, phase.start_example + over * phase.batch_size

    def __len__(self) -> int:
        return (self.phase.end_example - self.phase.start_example) // self.micro_batch

    def __iter__(self) -> Iterator[list[int]]:
        order = lru_cache(maxsize=1)(self.order)
        for start in range(self.start, self.phase.end_example, self.micro_batch):
            yield batches.indexes(order, self.examples, start, start + self.micro_batch)


class PhaseLoader(DataLoader):
    """A loader that Lightning takes for one that can be continued, by its state."""

    def __init__(self, trainer: Trainer, dataset: Dataset, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.trainer = trainer

    def state_dict(self) -> dict[str, int]:
        """How many micro-batches of an unfinished update there are."""
        made = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return {"within_update": made % self.trainer.accumulate_grad_batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Refuses a checkpoint from within an update: Lightning keeps no gradients in it.

        Raises:
            Mistake: for such a checkpoint.
        """
        if state_dict["within_update"]:
            raise Mistake(
                f"the checkpoint was taken within an update, after {state_dict['within_update']} "
                "micro-batches whose gradients Lightning does not keep; take one that was saved "
                "after an update, as ModelCheckpoint(every_n_train_steps=...) saves them."
            )


def _check(trainer: Trainer, table: Table) -> None:
    """Raises Mistake for a Trainer that would use other batches or rates than the table's."""
    if trainer.world_size > 1:
        raise Mistake(
            "ScheduledData runs in one process; several would not share an update's examples."
        )
    if trainer.reload_dataloaders_every_n_epochs != 1 or trainer.max_epochs != len(table.phases):
        raise Mistake(
            "each phase is one epoch of Lightning's: make the Trainer with "
            f"max_epochs={len(table.phases)} and reload_dataloaders_every_n_epochs=1."
        )
    found = [config for config in trainer.lr_scheduler_configs
             if isinstance(config.scheduler, ScheduledRates) and config.interval == "step"]
    if not found:
        raise Mistake(
            "the table's rates are not in use: return bigbatch.adapters.lightning.configured("
            "optimizer, table) from configure_optimizers."
        )
