"""Convolutional architectures whose branches are added, concatenated or multiplied, and grouped convolutions."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.channel_pruning.zoo_plain import conv_bn, images


class Classifier(nn.Module):
    """Blocks between a stem and a head, with the mean over positions before the head."""

    def __init__(self, stem, blocks, width, last_width=None):
        super().__init__()
        self.stem = conv_bn(stem, width)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(last_width or width, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class BasicBlock(nn.Module):
    """As in torchvision: two convolutions, and a 1x1 where the shape changes."""

    def __init__(self, fan_in, fan_out, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.downsample = None
        if stride != 1 or fan_in != fan_out:
            shortcut = nn.Conv2d(fan_in, fan_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(fan_out))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return F.relu(out)


def resnet_basic():
    """Basic blocks: a chain of additions couples several layers, and 1x1 shortcuts end one chain and start the next."""
    return Classifier(3, [BasicBlock(16, 16), BasicBlock(16, 32, 2), BasicBlock(32, 32)], 16, 32), images()


class PreActivationBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x):
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


def resnet_preactivation():
    """The norm comes first, so that the sum itself is never normalized."""
    return Classifier(3, [PreActivationBlock(24), PreActivationBlock(24)], 24), images()


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; grouped as in ResNeXt."""

    def __init__(self, fan_in, inner, fan_out, groups=1):
        super().__init__()
        last = nn.Sequential(nn.Conv2d(inner, fan_out, 1, bias=False), nn.BatchNorm2d(fan_out))
        self.body = nn.Sequential(conv_bn(fan_in, inner, 1), conv_bn(inner, inner, groups=groups), last)
        same = fan_in == fan_out
        self.shortcut = nn.Identity() if same else nn.Conv2d(fan_in, fan_out, 1)

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))


def resnet_bottleneck():
    """Bottleneck blocks: narrow inside, wide in the sum."""
    return Classifier(3, [Bottleneck(16, 16, 48), Bottleneck(48, 16, 48)], 16, 48), images()


def resnext():
    """Convolutions in 4 groups, so that each group must keep as many channels in and out."""
    return Classifier(3, [Bottleneck(16, 32, 48, groups=4), Bottleneck(48, 32, 48, groups=4)], 16, 48), images()


class DenseBlock(nn.Module):
    def __init__(self, fan_in, growth, layers):
        super().__init__()
        widths = [fan_in + growth * number for number in range(layers)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, growth, 3, padding=1)) for width in widths
        )

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


def densenet():
    """Each layer reads the concatenation of all before it, so one channel is at many offsets."""
    transition = nn.Sequential(nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 20, 1), nn.AvgPool2d(2))
    return Classifier(3, [DenseBlock(16, 8, 3), transition, DenseBlock(20, 8, 2)], 16, 36), images()


class InceptionBlock(nn.Module):
    def __init__(self, fan_in):
        super().__init__()
        self.one = conv_bn(fan_in, 8, 1)
        self.three = nn.Sequential(conv_bn(fan_in, 8, 1), conv_bn(8, 16, 3))
        self.five = nn.Sequential(conv_bn(fan_in, 4, 1), conv_bn(4, 8, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_bn(fan_in, 8, 1))

    def forward(self, x):
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], dim=1)


def inception():
    """Four branches of different widths side by side, twice."""
    return Classifier(3, [InceptionBlock(16), InceptionBlock(40)], 16, 40), images()


def depthwise(width, **arguments):
    return conv_bn(width, width, groups=width, **arguments)


def mobilenet_v1():
    """Depth-wise convolutions, whose channels go with those of the layer before."""
    blocks = [depthwise(16), conv_bn(16, 32, 1), depthwise(32, stride=2), conv_bn(32, 48, 1)]
    return Classifier(3, blocks, 16, 48), images()


class InvertedResidual(nn.Module):
    def __init__(self, fan_in, fan_out, expansion, stride=1):
        super().__init__()
        inner = fan_in * expansion
        self.residual = stride == 1 and fan_in == fan_out
        self.body = nn.Sequential(
            nn.Conv2d(fan_in, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(inplace=True),
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(inplace=True),
            nn.Conv2d(inner, fan_out, 1, bias=False),
            nn.BatchNorm2d(fan_out),
        )

    def forward(self, x):
        return x + self.body(x) if self.residual else self.body(x)


def mobilenet_v2():
    """Inverted residuals with ReLU6: depth-wise in the wide part, linear in the sum."""
    blocks = [InvertedResidual(16, 16, 3), InvertedResidual(16, 24, 3, 2), InvertedResidual(24, 24, 3)]
    return Classifier(3, blocks, 16, 24), images()


def depthwise_multiplier():
    """Each channel gives two in the depth-wise layer: half the outputs per input, in neighbouring pairs."""
    double = nn.Conv2d(16, 32, 3, padding=1, groups=16)
    return Classifier(3, [double, nn.BatchNorm2d(32), nn.ReLU(), conv_bn(32, 24, 1)], 16, 24), images()


class ShuffleUnit(nn.Module):
    """One half passes, the other is worked on; then their channels are interleaved."""

    def __init__(self, width):
        super().__init__()
        half = width // 2
        depth = nn.Sequential(nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False), nn.BatchNorm2d(half))
        self.branch = nn.Sequential(conv_bn(half, half, 1), depth, conv_bn(half, half, 1))

    def forward(self, x):
        kept, worked = x.chunk(2, dim=1)
        out = torch.cat((kept, self.branch(worked)), dim=1)
        batch, channels, height, width = out.shape
        return out.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def shufflenet():
    """Chunk, concatenation and channel shuffle, three times: where a channel comes from is hard to follow by hand."""
    return Classifier(3, [ShuffleUnit(32), ShuffleUnit(32), ShuffleUnit(32), conv_bn(32, 32, 1)], 32), images()


class SqueezeExcite(nn.Module):
    def __init__(self, width, reduction=4):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width // reduction, 1), nn.Conv2d(width // reduction, width, 1)

    def forward(self, x):
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.up(F.relu(self.down(scale))))


class LinearSqueezeExcite(nn.Module):
    def __init__(self, width, reduction=4):
        super().__init__()
        inner = width // reduction
        self.fc = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width), nn.Sigmoid())

    def forward(self, x):
        batch, channels, _, _ = x.size()
        return x * self.fc(x.mean((2, 3)).view(batch, channels)).view(batch, channels, 1, 1)


def squeeze_excite():
    """Channels multiplied by what two small layers make of all of them, once by 1x1 convolutions and once by Linear."""
    return Classifier(3, [SqueezeExcite(16), conv_bn(16, 32), LinearSqueezeExcite(32)], 16, 32), images()


class GhostModule(nn.Module):
    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.primary = conv_bn(fan_in, fan_out // 2, 1)
        self.cheap = depthwise(fan_out // 2)

    def forward(self, x):
        primary = self.primary(x)
        return torch.cat([primary, self.cheap(primary)], dim=1)


def ghostnet():
    """A concatenation of channels with what depth-wise layers make of the same: coupled across one concatenation."""
    return Classifier(3, [GhostModule(16, 32), GhostModule(32, 48)], 16, 48), images()


BRANCHES = [
    resnet_basic, resnet_preactivation, resnet_bottleneck, resnext, densenet, inception, mobilenet_v1, mobilenet_v2,
    depthwise_multiplier, shufflenet, squeeze_excite, ghostnet,
]  # fmt: skip
