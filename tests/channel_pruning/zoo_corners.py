"""What users write that is hard on a pruner: numbers in the code, bare parameters, reused layers, hidden couplings."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.channel_pruning.zoo_plain import conv_bn, images, with_head


class Reused(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.stem, self.conv = conv_bn(3, width), nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = F.relu(self.conv(self.stem(x)))
        return self.head(F.relu(self.conv(x)).mean((2, 3)))


def reused_conv():
    """One convolution is called twice in a row, so that its inputs are its own outputs."""
    return Reused(), images()


class SharedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([conv_bn(3, 24), conv_bn(24, 24, stride=2)])
        self.tower = conv_bn(24, 16)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        fine = self.stages[0](x)
        return tuple(self.head(self.tower(level)) for level in (fine, self.stages[1](fine)))


def shared_tower():
    """One tower reads two levels, which are coupled only by being read by the same layer."""
    return SharedHead(), images()


class HardCodedView(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = conv_bn(3, 16, stride=2), conv_bn(16, 32, stride=2)
        self.hidden, self.head = nn.Linear(512, 32), nn.Linear(32, 10)

    def forward(self, x):
        x = self.conv2(self.conv1(x))
        x = x.view(-1, 512)
        return self.head(F.relu(self.hidden(x)))


def hard_coded_view():
    """The code says 512: with half the channels it still runs, but mixes two images into one row."""
    return HardCodedView(), images()


class HardCodedSlice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = conv_bn(3, 16), conv_bn(8, 16), conv_bn(16, 16)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = self.conv1(x)
        left, right = x[:, :8], x[:, 8:]
        x = torch.cat([self.conv3(self.conv2(left)), right], dim=1)
        return self.head(x.mean((2, 3)))


def hard_coded_slice():
    """The code says 8: with half the channels the second part is empty."""
    return HardCodedSlice(), images()


class HardCodedHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.qkv, self.out = nn.Linear(12, 32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.hidden, self.head = nn.Linear(32, 48), nn.Linear(48, 10)

    def forward(self, x):
        x = self.embed(x)
        query, key, value = self.qkv(x).reshape(len(x), -1, 3, 4, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(len(x), -1, 32)
        return self.head(F.relu(self.hidden(x + self.out(y))).mean(1))


def hard_coded_heads():
    """Attention whose 4 heads of 8 are numbers in the code: what is around it can be cut."""
    return HardCodedHeads(), torch.randn(4, 10, 12)


def weight_norm():
    """Weights that are computed: a direction and a length per output channel, from parametrizations."""
    body = [parametrizations.weight_norm(nn.Conv2d(3, 16, 3)), nn.ReLU()]
    body += [parametrizations.weight_norm(nn.Conv2d(16, 32, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return with_head(body, parametrizations.weight_norm(nn.Linear(32, 10))), images()


def spectral_norm():
    """Computed weights again, with buffers as long as the weight is wide, and a norm over all channels together."""
    body = [parametrizations.spectral_norm(nn.Conv2d(3, 16, 3)), nn.LeakyReLU(0.1)]
    body += [parametrizations.spectral_norm(nn.Conv2d(16, 32, 3)), nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(1)]
    return with_head([*body, nn.Flatten()], nn.Linear(32, 10)), images()


class CustomLinear(nn.Module):
    """Not an nn.Linear: its weight lies the other way round."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(fan_in, fan_out) / fan_in**0.5)
        self.offset = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x):
        return x @ self.kernel + self.offset


def custom_linear():
    """Layers of the user's own, made of bare parameters, between known ones."""
    body = [CustomLinear(20, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), CustomLinear(32, 32), nn.ReLU()]
    return with_head(body, nn.Linear(32, 10)), torch.randn(4, 20)


class FrozenBackbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(3, 16), conv_bn(16, 32, stride=2)).requires_grad_(False)
        self.neck, self.head = conv_bn(32, 24), nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.neck(self.backbone(x)).mean((2, 3)))


def frozen_backbone():
    """The first half takes no gradients: no gradient tells about its couplings, though it may be cut."""
    return FrozenBackbone(), images()


class Maxout(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(20, 64), nn.Linear(32, 64)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        for layer in (self.first, self.second):
            x = layer(x).unflatten(1, (-1, 2)).amax(-1)
        return self.head(x)


def maxout():
    """Neighbours compete in pairs, and only the larger one goes on: half the gradients are zero."""
    return Maxout(), torch.randn(4, 20)


class SoftmaxGate(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = conv_bn(3, 24), nn.Conv2d(24, 24, 1)
        self.head = nn.Conv2d(24, 3, 1)

    def forward(self, x):
        x = self.first(x)
        return self.head(x * self.second(x).softmax(dim=1))


def softmax_over_channels():
    """A softmax over channels: every channel moves every other, but only one goes with each."""
    return SoftmaxGate(), images()


class CoordConv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(5, 16, 3, padding=1), nn.Conv2d(18, 24, 3, padding=1)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        line = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        plane = torch.stack(torch.meshgrid(line, line, indexing="ij")).expand(len(x), -1, -1, -1)
        x = F.relu(self.conv1(torch.cat([x, plane], 1)))
        x = F.relu(self.conv2(torch.cat([plane, x], 1)))
        return self.head(x.mean((2, 3)))


def coordconv():
    """Planes that are no layer's output are concatenated before the channels, and move them by two."""
    return CoordConv(), images()


class LearnedSum(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(20, 32) for _ in range(3))
        self.mix, self.table = nn.Parameter(torch.ones(3) / 3), nn.Parameter(torch.randn(32))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        stacked = torch.stack([branch(x) for branch in self.branches], dim=1)
        return self.head(F.relu((self.mix.softmax(0)[:, None] * stacked).sum(1) * self.table))


def stacked_branches():
    """Branches are stacked along a new dimension and weighed by bare parameters."""
    return LearnedSum(), torch.randn(4, 20)


class PaddedShortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = conv_bn(3, 16), nn.Sequential(conv_bn(16, 32, stride=2), nn.Conv2d(32, 32, 3, padding=1))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
        return self.head(F.relu(self.conv(x) + shortcut).mean((2, 3)))


def padded_shortcut():
    """As in the CIFAR ResNet: the shortcut is padded by 8 channels of zeros on each side, a number in the code."""
    return PaddedShortcut(), images()


CORNERS = [
    reused_conv, shared_tower, hard_coded_view, hard_coded_slice, hard_coded_heads, weight_norm, spectral_norm,
    custom_linear, frozen_backbone, maxout, softmax_over_channels, coordconv, stacked_branches, padded_shortcut,
]  # fmt: skip
