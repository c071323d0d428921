"""A schedule in a PyTorch loop: a batch sampler with growing batches, a scheduler of all rates."""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adamax, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Sampler

from bigbatch import schedule
from bigbatch.adapters import batches
from bigbatch.mistake import Mistake
from bigbatch.schedule import Table
from bigbatch.schedule.recipe import keeps_beta2, keeps_momentum

# Numbers of an optimizer that act once an update, so that a batch that grows changes what they do.
NOT_SCHEDULED = ("dampening", "alpha", "momentum_decay")  # of SGD, of RMSprop, of NAdam
L2_ONLY = (SGD, Adamax)  # of those with a momentum or betas; others say it in their groups


class ScheduledBatches(Sampler[list[int]]):
    """The indexes of each update's examples, for `DataLoader(batch_sampler=...)`.

    One batch of the loader is one update, over all epochs of the run. Where several processes each
    hold the model (DistributedDataParallel, which takes the mean of their gradients), process
    `rank` takes the places rank, rank + ranks, ... of each batch, so all have equally many.

    Args:
        table: of the run.
        order: of each epoch; see `batches.Order`. All processes need the same.
        from_update: the update to begin with, `last_epoch` of a continued run's `ScheduledRates`.
        rank: of this process.
        ranks: the number of processes.

    Raises:
        Mistake: if a batch is no multiple of `ranks`, or there is no such update.
    """

    def __init__(
        self, table: Table, order: batches.Order, from_update: int = 0, rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if not 0 <= from_update <= table.updates:
            raise Mistake(f"from_update is {from_update}; this schedule has {table.updates}.")
        if not 0 <= rank < ranks:
            raise Mistake(f"rank is {rank} of {ranks}; it must be from 0 to {ranks - 1}.")
        batches.check_multiples(table, ranks, f"the {ranks} processes")
        self.table, self.order = table, order
        self.from_update, self.rank, self.ranks = from_update, rank, ranks

    def __len__(self) -> int:
        return self.table.updates - self.from_update

    def __iter__(self) -> Iterator[list[int]]:
        order = functools.lru_cache(maxsize=1)(self.order)
        for update in range(self.from_update, self.table.updates):
            row = schedule.row(self.table, update)
            whole = batches.indexes(
                order, self.table.recipe.examples, row.start, row.start + row.batch_size)
            yield whole[self.rank :: self.ranks]


class ScheduledRates(LRScheduler):
    """Sets all rates of the next update; `step()` follows each `optimizer.step()`.

    They are written to each parameter group: `lr`, the first two of `betas` or `momentum`, and
    `weight_decay` if the recipe has one, which is decoupled. A group may have a multiple of the
    recipe's rate or decay, which it keeps; 0 is one. An L2 decay, as in `torch.optim.SGD`, is left
    as it is. `last_epoch` counts updates, and after the last one the rates stay as they are.

    Args:
        optimizer: made with the recipe's learning rate and weight decay, and with the recipe's
            momentum or betas or without any.
        table: of the run.

    Raises:
        Mistake: if no group has the recipe's learning rate or weight decay; if the optimizer
            averages gradients (it has `betas`) where the recipe says that it adds them up, or the
            other way round, or does neither; if a group has another momentum or other betas, an L2
            decay where the recipe's is decoupled, a decoupled one where the recipe has none, or a
            number of `NOT_SCHEDULED`.
    """

    def __init__(self, optimizer: Optimizer, table: Table) -> None:
        self.table = table
        recipe = table.recipe
        for group in optimizer.param_groups:
            _check_kind(group, recipe)
            if "initial_lr" not in group:  # else what it has is a schedule's, of a run continued
                _check_averages(group, recipe, optimizer)
            group.setdefault("initial_lr", float(group["lr"]))
            group.setdefault("initial_weight_decay", group.get("weight_decay", 0.0))
            _check_decay(group, recipe, optimizer)
        self.rate_factors = _factors(optimizer, "lr", "learning_rate", recipe)
        self.decay_factors = _factors(optimizer, "weight_decay", "weight_decay", recipe)
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """The rate of each group at update `last_epoch`; sets the groups' other rates."""
        row = schedule.row(self.table, min(self.last_epoch, self.table.updates - 1))
        rates = row.rates
        # Not at the first: an optimizer that has been loaded is at another, which comes later.
        if row.start and any(row.start == phase.start_example for phase in self.table.phases):
            self._count_as_of_now(row)
        for group, factor in zip(self.optimizer.param_groups, self.decay_factors, strict=True):
            if "betas" in group:
                group["betas"] = (rates.momentum, rates.beta2, *group["betas"][2:])
            elif "momentum" in group:
                group["momentum"] = rates.momentum
            if self.table.recipe.weight_decay:
                group["weight_decay"] = rates.weight_decay * factor
        return [rates.learning_rate * factor for factor in self.rate_factors]

    def _count_as_of_now(self, row: schedule.Row) -> None:
        """Sets Adam's count to that of updates of the present batch.

        It divides its averages by 1 - beta^count. Under betas that are kept per example this is
        what gradients weigh in them, if the examples so far are counted in batches of today.
        """
        if not keeps_beta2(self.table.recipe):
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"] if "betas" in group else ():
                count = self.optimizer.state.get(parameter, {}).get("step")
                if isinstance(count, Tensor):
                    count.fill_(row.start / row.batch_size)

    def go_to(self, update: int) -> None:
        """Sets the rates of an update. `step()` goes to the next."""
        if update != self.last_epoch:
            self.last_epoch = update - 1
            self._update_lr()

    def state_dict(self) -> dict[str, Any]:
        """The number of the next update, and its row, by which another schedule is noticed."""
        return {"last_epoch": self.last_epoch, "row": self._row()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes to the update of a saved state, and sets its rates.

        Raises:
            Mistake: if that update would have another start, batch or rate than when it was saved.
        """
        self.last_epoch = state_dict["last_epoch"] - 1
        self._update_lr()
        if (row := self._row()) != state_dict["row"]:
            raise Mistake(
                f"the state was saved before update {self.last_epoch} with (start, batch, rates) "
                f"{state_dict['row']}, and this schedule has {row} there; continue with the recipe,"
                " strategy and limits that the run began with."
            )

    def _row(self) -> list[float]:
        if self.last_epoch >= self.table.updates:
            return [self.table.examples]
        row = schedule.row(self.table, self.last_epoch)
        return [row.start, row.batch_size, *row.rates]


def _check_kind(group: dict[str, Any], recipe: schedule.Recipe) -> None:
    if "betas" in group and recipe.accumulates:
        raise Mistake(
            "the optimizer has betas, so it averages gradients; say so in the recipe: "
            "accumulates=False, and exchange='sqrt' for Adam."
        )
    if recipe.momentum and "momentum" in group and not recipe.accumulates:
        raise Mistake("the optimizer adds gradients up; set accumulates=True in the recipe.")
    if "betas" in group and keeps_momentum(recipe) != keeps_beta2(recipe):
        raise Mistake(
            "per_example.momentum and per_example.beta2 differ, but PyTorch's Adam corrects both "
            "averages by one count of updates; set both to True, or both to False."
        )
    if group.get("nesterov") and keeps_momentum(recipe):
        raise Mistake(
            "the optimizer has nesterov=True, which uses the momentum twice in a step, and with "
            "per_example.momentum=True a change of the batch carries its accumulator over by the "
            "momentum; set one of them to False."
        )
    if not {"betas", "momentum"} & set(group):
        raise Mistake(
            "the optimizer has neither betas nor a momentum; the schedules are those of SGD and of "
            "optimizers such as Adam."
        )
    for key in NOT_SCHEDULED:
        if group.get(key):
            raise Mistake(
                f"the optimizer has {key} {group[key]:g}, which acts once an update and which no "
                "table sets, so growing batches would change its effect; take SGD without "
                "dampening, or Adam or AdamW."
            )


def _check_averages(group: dict[str, Any], recipe: schedule.Recipe, optimizer: Optimizer) -> None:
    """Refuses a momentum or betas that the table would replace, where somebody chose them."""
    key = "betas" if "betas" in group else "momentum"
    stated = (recipe.momentum, recipe.beta2) if key == "betas" else recipe.momentum
    parameter = inspect.signature(type(optimizer)).parameters.get(key)
    given, default = (
        tuple(value[:2]) if isinstance(value, tuple | list) else value
        for value in (group[key], parameter and parameter.default))
    if given not in (stated, default):
        raise Mistake(
            f"the optimizer has {key} {given}, and the table starts from the recipe's {stated}; "
            "change one of them, or leave the optimizer's out."
        )


def _check_decay(group: dict[str, Any], recipe: schedule.Recipe, optimizer: Optimizer) -> None:
    if not group["initial_weight_decay"]:
        return
    # None: an optimizer of the user's own, which does not say.
    decoupled = False if isinstance(optimizer, L2_ONLY) else group.get("decoupled_weight_decay")
    if recipe.weight_decay and decoupled is False:
        raise Mistake(
            f"recipe.weight_decay is {recipe.weight_decay:g} and decoupled, and the optimizer adds "
            "its decay to the gradient (L2); take AdamW, or leave the decay to the optimizer alone "
            "with recipe.weight_decay=0."
        )
    if decoupled and not recipe.weight_decay:
        raise Mistake(
            f"the optimizer has a decoupled weight decay of {group['initial_weight_decay']:g}, and "
            "recipe.weight_decay is 0; state it there, or give the optimizer weight_decay=0."
        )


def _factors(optimizer: Optimizer, key: str, name: str, recipe: schedule.Recipe) -> list[float]:
    """What multiple of the recipe's value each group has."""
    given = [float(group[f"initial_{key}"]) for group in optimizer.param_groups]
    stated = getattr(recipe, name)
    if stated and stated not in given:
        raise Mistake(
            f"recipe.{name} is {stated:g}, and the optimizer's parameter groups have {key} "
            f"{', '.join(f'{value:g}' for value in given)}; one must have the recipe's."
        )
    return [value / stated if stated else 1.0 for value in given]
