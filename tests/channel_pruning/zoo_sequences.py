"""Recurrent and temporal networks, mixers, gates and other blocks on the last dimension."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.channel_pruning.zoo_attention import SequenceClassifier, SwiGLU, mlp_of, tokens
from tests.channel_pruning.zoo_plain import conv_bn, images, with_head


class Residual(nn.Module):
    def __init__(self, width, body):
        super().__init__()
        self.norm, self.body = nn.LayerNorm(width), body

    def forward(self, x):
        return x + self.body(self.norm(x))


def layernorm_mlp():
    """LayerNorm over the features of a residual stream: it must not see a channel that is gone."""
    body = [nn.Linear(20, 32), Residual(32, mlp_of(32, 64)), Residual(32, mlp_of(32, 64)), nn.LayerNorm(32)]
    return with_head(body, nn.Linear(32, 10)), torch.randn(4, 20)


class ConvNeXtBlock(nn.Module):
    """Depth-wise 7x7, then Linear layers on channels that are last, scaled by a bare parameter."""

    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma = nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x):
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.gamma * self.down(F.gelu(self.up(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.blocks = nn.Sequential(ConvNeXtBlock(width), ConvNeXtBlock(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x)).mean([-2, -1])))


def convnext():
    """Channels change their place between the second and the last dimension, and a bare parameter scales them."""
    return ConvNeXt(), images()


class GLU(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.both, self.down = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x):
        return self.down(F.glu(self.both(x), dim=-1))


def glu():
    """A gated feed-forward from one layer: channel i goes with channel i + inner."""
    return SequenceClassifier(12, 32, [Residual(32, GLU(32, 48))]), torch.randn(4, 10, 12)


def swiglu():
    """A gated feed-forward from two layers that are multiplied."""
    return SequenceClassifier(12, 32, [Residual(32, SwiGLU(32, 48))]), torch.randn(4, 10, 12)


class MixerBlock(nn.Module):
    def __init__(self, length, width):
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(width), mlp_of(length, 32)
        self.norm2, self.channels = nn.LayerNorm(width), mlp_of(width, 64)

    def forward(self, x):
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


def mlp_mixer():
    """Linear layers over positions and over channels, in turns: positions are not channels to cut."""
    return SequenceClassifier(12, 24, [MixerBlock(16, 24), MixerBlock(16, 24)]), torch.randn(4, 16, 12)


class CRNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(conv_bn(1, 16), nn.MaxPool2d(2), conv_bn(16, 16), nn.MaxPool2d((4, 1)))
        self.lstm = nn.LSTM(32, 24, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, 12)

    def forward(self, x):
        x = self.features(x).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.lstm(x)[0])


def lstm_on_cnn():
    """A bidirectional LSTM reads columns of feature maps; height and channels are flattened together."""
    return CRNN(), images(1, 16)


class GRUTagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 24, padding_idx=0)
        self.gru = nn.GRU(24, 32, num_layers=2, batch_first=True, dropout=0.1)
        self.hidden, self.head = nn.Linear(32, 24), nn.Linear(24, 10)

    def forward(self, x):
        _, last = self.gru(self.embedding(x))
        return self.head(F.relu(self.hidden(last[-1])))


def gru_on_embedding():
    """A GRU of two layers over embeddings; its last state goes on."""
    return GRUTagger(), tokens()


class CellLoop(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.width = width
        self.encode, self.cell = nn.Linear(8, 32), nn.GRUCell(32, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        state = x.new_zeros(len(x), self.width)
        for step in x.unbind(1):
            state = self.cell(F.relu(self.encode(step)), state)
        return self.head(state)


def gru_cell_loop():
    """A cell called in a Python loop, with a state whose width is an attribute."""
    return CellLoop(), torch.randn(4, 5, 8)


class TemporalBlock(nn.Module):
    def __init__(self, fan_in, fan_out, dilation):
        super().__init__()
        self.padding = 2 * dilation
        self.conv1 = nn.Conv1d(fan_in, fan_out, 3, dilation=dilation)
        self.conv2 = nn.Conv1d(fan_out, fan_out, 3, dilation=dilation)
        self.shortcut = nn.Conv1d(fan_in, fan_out, 1) if fan_in != fan_out else nn.Identity()

    def forward(self, x):
        y = F.relu(self.conv1(F.pad(x, (self.padding, 0))))
        y = F.relu(self.conv2(F.pad(y, (self.padding, 0))))
        return F.relu(y + self.shortcut(x))


def temporal_cnn():
    """Dilated, causal and residual in one dimension."""
    blocks = [TemporalBlock(6, 16, 1), TemporalBlock(16, 32, 2), TemporalBlock(32, 32, 4)]
    return with_head(blocks, nn.Conv1d(32, 5, 1)), torch.randn(4, 6, 24)


class WaveNet(nn.Module):
    def __init__(self, width=16, skip=24):
        super().__init__()
        self.width = width
        self.stem = nn.Conv1d(1, width, 1)
        self.gated = nn.ModuleList(nn.Conv1d(width, 2 * width, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.residual = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(2))
        self.skip = nn.ModuleList(nn.Conv1d(width, skip, 1) for _ in range(3))
        self.head = nn.Conv1d(skip, 8, 1)

    def forward(self, x):
        x, total = self.stem(x), 0
        for number, gated in enumerate(self.gated):
            content, gate = torch.split(gated(x), self.width, dim=1)
            y = content.tanh() * gate.sigmoid()
            total = total + self.skip[number](y)
            if number < len(self.residual):
                x = x + self.residual[number](y)
        return self.head(F.relu(total))


def wavenet():
    """Gates split by an attribute's width, a residual sum, and a second sum over all skips."""
    return WaveNet(), torch.randn(4, 1, 24)


SEQUENCES = [
    layernorm_mlp, convnext, glu, swiglu, mlp_mixer, lstm_on_cnn, gru_on_embedding, gru_cell_loop, temporal_cnn,
    wavenet,
]  # fmt: skip
