"""ResNets as plain Lightning runs: ResNet-8 and ResNet-20 for 32 x 32 images, ResNet-50 for 224 x 224 images."""

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_compress.recipes.cifar10 import ResNet

WIDTH = 32


class ResNet20(ResNet):
    """The recipe's ResNet with a constant learning rate, as runs need that have no planned length.

    Args:
        depth: blocks in each of the three stages.
        width: channels of the first stage.

    Reference: He et al., 2015, section 4.2, https://arxiv.org/abs/1512.03385
    """

    def __init__(self, depth: int = 3, width: int = 16) -> None:
        super().__init__(depth, width=width)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


class ResNet8(ResNet20):
    """0.08 M parameters: one block where ResNet-20 has three."""

    def __init__(self) -> None:
        super().__init__(depth=1)


class WideResNet20(ResNet20):
    """ResNet-20 of twice the usual width: 1.07 M parameters."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth, WIDTH)


class Network(nn.Module):
    """The layers of a ResNet without the LightningModule around them, which `torch.export` cannot trace."""

    def __init__(self, model: ResNet20) -> None:
        super().__init__()
        self.conv, self.norm, self.stages, self.head = model.conv, model.norm, model.stages, model.head

    forward = ResNet.forward


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


class ResNet50(pl.LightningModule):
    """25.6 M parameters; He et al., 2015, table 1, https://arxiv.org/abs/1512.03385"""

    label_smoothing = 0.0

    def __init__(self) -> None:
        super().__init__()
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

    training_step, configure_optimizers = ResNet20.training_step, ResNet20.configure_optimizers
