"""The task of `tables` in PyTorch: the data, the model and the optimizers."""

import numpy as np
import torch

from bigbatch.schedule import Table
from tests.adapters.tables import FEATURES, TARGETS, Taken


class Examples(torch.utils.data.Dataset):
    """Each example with its index, so that a loop can record what it takes."""

    def __len__(self):
        return len(TARGETS)

    def __getitem__(self, index):
        return {"features": torch.tensor(FEATURES[index]), "labels": torch.tensor(TARGETS[index]),
                "index": index}


class Linear(torch.nn.Module):
    """Three weights, in float64."""

    def __init__(self):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, features):
        return features @ self.weights


def make_optimizer(table: Table, parameters) -> torch.optim.Optimizer:
    """The optimizer that a recipe of `tables` is for, without its momentum or betas."""
    rate, decay = table.recipe.learning_rate, table.recipe.weight_decay
    if table.recipe.accumulates:
        return torch.optim.SGD(parameters, lr=rate)
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)


def in_optimizer(optimizer: torch.optim.Optimizer) -> tuple[float, ...]:
    """The rates with which an optimizer steps."""
    group = optimizer.param_groups[0]
    if "betas" in group:
        return (group["lr"], *group["betas"], group["weight_decay"])
    return group["lr"], group["momentum"]


class Recorder:
    """Notes the examples of each optimizer step, and the rates in the optimizer at that step."""

    def __init__(self):
        self.taken: list[Taken] = []
        self.examples: list[int] = []

    def see(self, index) -> None:
        self.examples += map(int, index)

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_post_hook(self._after_step)  # Lightning's steps call the model

    def _after_step(self, optimizer, args, kwargs) -> None:
        self.taken.append(Taken(tuple(self.examples), in_optimizer(optimizer)))
        self.examples = []


def array(model: torch.nn.Module) -> np.ndarray:
    return model.weights.detach().numpy()
