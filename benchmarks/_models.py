"""ResNets for images of 32 x 32, as plain Lightning runs."""

from itertools import pairwise

import pytorch_lightning as pl
import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, which pads channels with zeros where they double."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.padding = outputs // inputs, (outputs - inputs) // 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=self.stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        shortcut = features
        if self.padding:
            thinned = features[:, :, :: self.stride, :: self.stride]
            shortcut = nn.functional.pad(thinned, (0, 0, 0, 0, self.padding, self.padding))
        return (self.norm2(self.conv2(self.norm1(self.conv1(features)).relu())) + shortcut).relu()


class ResNet20(pl.LightningModule):
    """0.27 M parameters; He et al., 2015, section 4.2, https://arxiv.org/abs/1512.03385"""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.blocks = nn.Sequential(*(Block(*pair) for pair in pairwise(widths)))
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(self.norm(self.conv(images)).relu())
        return self.head(features.mean((2, 3)))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


class ResNet8(ResNet20):
    """0.08 M parameters: one block where ResNet-20 has three."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(16, 16), Block(16, 32), Block(32, 64))
