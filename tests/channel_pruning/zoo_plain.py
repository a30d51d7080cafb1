"""Architectures without branches: chains of layers, and what can stand between two of them."""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F


def with_head(body, head):
    """A chain whose output layer is named like in the whole zoo."""
    return nn.Sequential(OrderedDict(body=nn.Sequential(*body), head=head))


def conv_bn(fan_in, fan_out, kernel=3, **arguments):
    return nn.Sequential(
        nn.Conv2d(fan_in, fan_out, kernel, padding=kernel // 2, bias=False, **arguments),
        nn.BatchNorm2d(fan_out),
        nn.ReLU(),
    )


def images(channels=3, size=16):
    return torch.randn(4, channels, size, size)


def plain_cnn():
    """Convolution, BatchNorm, ReLU: the case that has to work."""
    body = [conv_bn(3, 16), conv_bn(16, 32, stride=2), conv_bn(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return with_head(body, nn.Linear(32, 10)), images()


def cnn_flattened():
    """No BatchNorm, and a flatten at 4x4: each channel becomes 16 features of a Linear."""
    body = [nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
    return with_head([*body, nn.Flatten(), nn.Linear(512, 24), nn.ReLU()], nn.Linear(24, 10)), images()


def mlp():
    """Linear after Linear."""
    body = [nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 48), nn.Tanh()]
    return with_head(body, nn.Linear(48, 10)), torch.randn(4, 20)


def mlp_batchnorm():
    """BatchNorm1d between Linear layers."""
    body = [nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU()]
    return with_head(body, nn.Linear(48, 10)), torch.randn(4, 20)


def mlp_dropout():
    """Dropout, which differs from call to call while training."""
    body = [nn.Linear(20, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.2)]
    return with_head(body, nn.Linear(48, 10)), torch.randn(4, 20)


def vgg():
    """Pairs of convolutions, pooling, a flatten and a classifier of two layers with dropout."""
    features = [conv_bn(3, 16), conv_bn(16, 16), nn.MaxPool2d(2), conv_bn(16, 32), conv_bn(32, 32), nn.MaxPool2d(2)]
    classifier = [nn.Flatten(), nn.Linear(512, 64), nn.ReLU(inplace=True), nn.Dropout()]
    return with_head([*features, *classifier], nn.Linear(64, 10)), images()


class LeNet5(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.head = nn.Linear(84, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = torch.flatten(x, 1)
        return self.head(F.relu(self.fc2(F.relu(self.fc1(x)))))


def lenet5():
    """Functional pooling and activation, a flatten at 5x5, odd numbers of channels."""
    return LeNet5(), images(1, 32)


def groupnorm_cnn():
    """GroupNorm: the channels left must be a multiple of its groups, and each group must keep as many."""
    body = [nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 32, 3), nn.GroupNorm(8, 32), nn.SiLU()]
    return with_head([*body, nn.AdaptiveAvgPool2d(1), nn.Flatten()], nn.Linear(32, 10)), images()


def instancenorm_cnn():
    """InstanceNorm with weights and running statistics of its own."""
    body = []
    for fan_in, fan_out in ((3, 16), (16, 32)):
        norm = nn.InstanceNorm2d(fan_out, affine=True, track_running_stats=True)
        body += [nn.Conv2d(fan_in, fan_out, 3), norm, nn.LeakyReLU(0.1)]
    return with_head([*body, nn.AdaptiveMaxPool2d(1), nn.Flatten()], nn.Linear(32, 10)), images()


def prelu_cnn():
    """PReLU with one slope per channel, and one with a single slope for all."""
    body = [nn.Conv2d(3, 16, 3), nn.PReLU(16), nn.Conv2d(16, 32, 3), nn.PReLU()]
    return with_head([*body, nn.AdaptiveAvgPool2d(1), nn.Flatten()], nn.Linear(32, 10)), images()


def cnn_1d():
    """Conv1d and BatchNorm1d over time."""
    body = [nn.Conv1d(6, 16, 5), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 5, stride=2), nn.ReLU()]
    return with_head([*body, nn.AdaptiveAvgPool1d(1), nn.Flatten()], nn.Linear(32, 10)), torch.randn(4, 6, 24)


def cnn_3d():
    """Conv3d and BatchNorm3d over space and time, then a flatten at 2x2x2."""
    body = [nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2)]
    body += [nn.Conv3d(8, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten()]
    return with_head(body, nn.Linear(128, 10)), torch.randn(4, 1, 8, 8, 8)


def autoencoder():
    """Down by Conv2d and up by ConvTranspose2d, whose weight has its input channels first."""
    down = [nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
    up = [nn.ConvTranspose2d(32, 16, 2, stride=2), nn.BatchNorm2d(16), nn.ReLU()]
    return with_head([*down, *up], nn.ConvTranspose2d(16, 3, 2, stride=2)), images()


class VariationalAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(64, 48)
        self.head_statistics = nn.Linear(48, 16)
        self.decoder = nn.Linear(8, 48)
        self.head = nn.Linear(48, 64)

    def forward(self, x):
        mean, log_variance = self.head_statistics(F.relu(self.encoder(x))).chunk(2, dim=1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        latent = mean + noise * (0.5 * log_variance).exp()
        return self.head(F.relu(self.decoder(latent))), mean, log_variance


def variational_autoencoder():
    """One layer gives means and variances as halves, which are coupled in pairs and are outputs themselves."""
    return VariationalAutoencoder(), torch.randn(4, 64)


def super_resolution():
    """PixelShuffle: every 4 channels become one, and the rest of the network sees them as one."""
    body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 64, 3, padding=1), nn.PixelShuffle(2), nn.ReLU()]
    return with_head([*body, nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()], nn.Conv2d(16, 3, 3, padding=1)), images(3, 8)


PLAIN = [
    plain_cnn, cnn_flattened, mlp, mlp_batchnorm, mlp_dropout, vgg, lenet5, groupnorm_cnn, instancenorm_cnn, prelu_cnn,
    cnn_1d, cnn_3d, autoencoder, variational_autoencoder, super_resolution,
]  # fmt: skip
