"""A Llama and its update in PyTorch, to be timed against. Needs torch, which bigbatch does not.

Written as plainly as nanoGPT (https://github.com/karpathy/nanoGPT): blocks of fused attention
(`scaled_dot_product_attention`) and SwiGLU, cross entropy, AdamW. The network is
`bigbatch.models.transformer`'s with its default options, layer for layer. On a GPU under autocast
to bfloat16 and compiled.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """x + attention(norm(x)), then x + down(silu(gate(norm(x))) * up(norm(x)))."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.RMSNorm(width, 1e-5)
        self.feed_forward_norm = nn.RMSNorm(width, 1e-5)
        for name in ("query", "key", "value", "output"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        y = self.attention_norm(x)
        query, key, value = (
            layer(y).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value))
        y = functional.scaled_dot_product_attention(
            _rotate(query, cos, sin), _rotate(key, cos, sin), value, is_causal=True)
        x = x + self.output(y.transpose(1, 2).reshape(batch, length, width))
        y = self.feed_forward_norm(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Llama(nn.Module):
    """Logits of the next token; angles are made for sequences of `length`."""

    def __init__(
        self, vocabulary: int, length: int, blocks: int, width: int, heads: int, hidden: int
    ):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(blocks))
        self.norm = nn.RMSNorm(width, 1e-5)
        self.head = nn.Linear(width, vocabulary, bias=False)
        size = width // heads
        places, features = torch.arange(length).double(), torch.arange(0, size, 2).double()
        angles = torch.outer(places, 10_000.0 ** (-features / size))
        for name, values in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, values.to(self.norm.weight.dtype), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(self.norm(x))


def fill(network: Llama, params: Mapping[str, Any]) -> None:
    """Gives a network the parameters of `bigbatch.models.transformer.Transformer`.

    Raises:
        ValueError: if the two have not the same.
    """
    own = dict(network.named_parameters())
    given = {}

    def walk(tree: Mapping, path: tuple[str, ...]) -> None:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                walk(value, (*path, str(name)))
                continue
            layers = [part for part in path if part not in ("attention", "feed_forward")]
            array = np.asarray(value)
            given[".".join([*layers, "weight"])] = array.T if name == "kernel" else array

    walk(params, ())
    shapes = ({name: tuple(value.shape) for name, value in arrays.items()}
              for arrays in (own, given))
    if next(shapes) != next(shapes):
        raise ValueError("PyTorch's network has other parameters than ours.")
    with torch.no_grad():
        for name, value in given.items():
            own[name].copy_(torch.tensor(value))


class Update:
    """An update over and over on one batch."""

    def __init__(
        self, network: Llama, tokens_BxT1: np.ndarray, rate: float, betas: tuple[float, float],
        weight_decay: float, threads: int,
    ):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(threads)
        self.network = network.to(device)
        self.run = torch.compile(self.network) if device == "cuda" else self.network
        self.tokens = torch.tensor(tokens_BxT1.astype(np.int64)).to(device)
        parameters = list(self.network.parameters())
        groups = [{"params": [one for one in parameters if one.ndim > 1]},
                  {"params": [one for one in parameters if one.ndim == 1], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=rate, betas=betas, weight_decay=weight_decay, fused=True)

    def take(self, updates: int = 1) -> float:
        """So many updates; returns the loss before the last."""
        on_gpu = self.tokens.is_cuda
        for _ in range(updates):
            with torch.autocast(self.tokens.device.type, torch.bfloat16, enabled=on_gpu):
                logits = self.run(self.tokens[:, :-1])
                loss = functional.cross_entropy(
                    logits.flatten(0, 1).float(), self.tokens[:, 1:].flatten())
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
        return loss.item()
