"""A schedule in Hugging Face's Trainer: what it takes for a batch is the whole of one update.

The Trainer's own accumulation is fixed from its start: it tells from the number of micro-batches so
far, by a remainder, when to step. So `gradient_accumulation_steps` stays 1, the loader gives the
micro-batches of one update together, and `training_step` adds up their gradients. The Trainer's
steps are updates, and its checkpoints, its skipping of batches and its logs count them rightly.
"""

from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from transformers import Trainer

from bigbatch.adapters import batches
from bigbatch.adapters.pytorch import ScheduledBatches, ScheduledRates
from bigbatch.mistake import Mistake
from bigbatch.schedule import Table


class ScheduledTrainer(Trainer):
    """A Trainer whose batches and rates are those of a table.

    The micro-batch is `args.per_device_train_batch_size`, and each update takes a whole number of
    them. The loss is normalised over the whole update, by the number of items where the model or
    the loss function takes `num_items_in_batch`, and as the mean of the micro-batches otherwise.

    One pass over the loader is the whole run, so the Trainer's "epoch" runs from 0 to 1, and
    evaluations and checkpoints are asked for in steps.

    Args:
        *args: of `Trainer`.
        table: of the run. `args.learning_rate` and `args.weight_decay` must be its recipe's.
        order: of each epoch; see `batches.Order`.
        **options: of `Trainer`. Of `optimizers`, the scheduler is None.

    Raises:
        Mistake: if a batch is no multiple of the micro-batch, the training set has another size
            than the recipe says, there are several processes or devices, or an argument says
            something else than the table.
    """

    def __init__(self, *args: Any, table: Table, order: batches.Order, **options: Any) -> None:
        super().__init__(*args, **options)
        self.table, self.order = table, order
        batches.micro_batches(table, self.args.per_device_train_batch_size)
        batches.check_length(self.train_dataset, table)
        if (self.args.world_size > 1 or self.args.n_gpu > 1 or self.is_deepspeed_enabled
                or self.is_fsdp_enabled):
            raise Mistake(
                "ScheduledTrainer runs in one process on one device, without DeepSpeed or FSDP; "
                "several processes would not share an update's examples."
            )
        if self.args.ignore_data_skip:
            raise Mistake(
                "ignore_data_skip is True, so a continued run would begin with the first examples "
                "again; set it to False. Skipping reads no data here."
            )
        if self.args.gradient_accumulation_steps != 1:
            raise Mistake(
                f"gradient_accumulation_steps is {self.args.gradient_accumulation_steps}; leave it "
                "1: the table says how many micro-batches an update takes."
            )
        if self.lr_scheduler is not None:
            raise Mistake("a scheduler was given; the table has the rates: pass (optimizer, None).")
        if self.args.max_steps > table.updates:
            raise Mistake(
                f"max_steps is {self.args.max_steps}, and the schedule has {table.updates} updates."
            )
        if self.args.max_steps < 0:
            self.args.max_steps = table.updates

    def get_train_dataloader(self) -> DataLoader:
        """The Trainer's own loader with other batches: each is one update's micro-batches."""
        own = super().get_train_dataloader()
        return DataLoader(
            own.dataset, batch_sampler=ScheduledBatches(self.table, self.order),
            collate_fn=partial(_collate, own.collate_fn, self.args.per_device_train_batch_size),
            num_workers=own.num_workers, pin_memory=own.pin_memory,
            worker_init_fn=own.worker_init_fn, prefetch_factor=own.prefetch_factor,
            persistent_workers=own.persistent_workers,
            multiprocessing_context=own.multiprocessing_context,
        )

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> ScheduledRates:
        """The table's rates."""
        own = optimizer or self.optimizer
        own = getattr(own, "optimizer", own)  # Accelerate's wrapper does not tell its kind
        self.lr_scheduler = ScheduledRates(own, self.table)
        self._created_lr_scheduler = True  # as in Trainer: a second `train` makes a new one
        return self.lr_scheduler

    def training_step(
        self, model: torch.nn.Module, inputs: list[dict[str, Any]],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Adds up the gradients of an update's micro-batches; returns the loss over all of them."""
        # A step that float16's scaler left out has not moved the scheduler on, but its examples
        # have been taken.
        self.lr_scheduler.go_to(self.state.global_step)
        _, items = self.get_batch_samples(iter(inputs), len(inputs), self.args.device)
        self.current_gradient_accumulation_steps = len(inputs)
        return sum(
            super(ScheduledTrainer, self).training_step(model, micro_batch, items)
            for micro_batch in inputs
        )

    def floating_point_ops(self, inputs: list[dict[str, Any]]) -> int:
        """Those of an update."""
        return sum(super(ScheduledTrainer, self).floating_point_ops(micro) for micro in inputs)

    def _track_num_input_tokens(self, inputs: list[dict[str, Any]]) -> None:
        for micro_batch in inputs:
            super()._track_num_input_tokens(micro_batch)


def _collate(collate: Any, size: int, examples: list[Any]) -> list[Any]:
    return [collate(part) for part in batches.cut(examples, size)]
