"""WRN-16-4 and its update in PyTorch, to be timed against. Needs torch, which bigbatch does not.

The network is `bigbatch.models.wide_resnet`'s, layer for layer; channels last, stochastic gradient
descent with momentum. On a GPU under autocast to bfloat16 and compiled.
"""

import numpy as np
import torch
from torch import nn


class Block(nn.Module):
    """BN-ReLU-conv3-BN-ReLU-conv3 added to the input, or to its strided 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.project = (
            nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        active = self.norm1(x).relu()
        y = self.conv2(self.norm2(self.conv1(active)).relu())
        return y + (x if self.project is None else self.project(active))


class WideResNet(nn.Module):
    """WRN-`depth`-`width`."""

    def __init__(self, depth: int, width: int, num_classes: int, channels: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        features, blocks = 16, []
        for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for place in range((depth - 4) // 6):
                blocks.append(Block(features, outputs, 2 if group and not place else 1))
                features = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(features)
        self.head = nn.Linear(features, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.blocks(self.conv(x))).relu()
        return self.head(x.mean((2, 3)))


class Update:
    """An update over and over on one batch."""

    def __init__(
        self, depth: int, width: int, num_classes: int, images_BxHxWxC: np.ndarray,
        labels_B: np.ndarray, rate: float, momentum: float, weight_decay: float, threads: int,
    ):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(threads)
        torch.backends.cudnn.benchmark = True
        network = WideResNet(depth, width, num_classes, images_BxHxWxC.shape[-1])
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        network = network.to(self.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            network.parameters(), rate, momentum, weight_decay=weight_decay)
        self.images = torch.from_numpy(np.array(images_BxHxWxC)).permute(0, 3, 1, 2).to(
            self.device, memory_format=torch.channels_last)
        self.labels = torch.from_numpy(np.array(labels_B, np.int64)).to(self.device)
        self.network = torch.compile(network) if self.device == "cuda" else network

    def take(self) -> None:
        """One update; waits for it."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = nn.functional.cross_entropy(self.network(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        self.loss = float(loss.detach())
