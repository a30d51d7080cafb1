"""ResNets as plain Lightning runs: for images of 32 x 32, and the one of 50 layers for those of 224 x 224."""

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


class Bottleneck(nn.Module):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1 beside a shortcut, which is a convolution where shapes change."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, features: Tensor) -> Tensor:
        changed = self.norm1(self.conv1(features)).relu()
        changed = self.norm2(self.conv2(changed)).relu()
        return (self.norm3(self.conv3(changed)) + self.shortcut(features)).relu()


class ResNet50(ResNet20):
    """25.6 M parameters; He et al., 2015, table 1, https://arxiv.org/abs/1512.03385"""

    def __init__(self) -> None:
        pl.LightningModule.__init__(self)
        self.conv, self.norm = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks, inputs = [], 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for number in range(count):
                blocks.append(Bottleneck(inputs, width, stride if number == 0 else 1))
                inputs = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(2048, 1000)

    def forward(self, images: Tensor) -> Tensor:
        features = self.blocks(self.pool(self.norm(self.conv(images)).relu()))
        return self.head(features.mean((2, 3)))
