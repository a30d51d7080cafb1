"""Deployables made by hand: small networks with weights on grids and quantizers where integer kernels want them."""

import torch
from torch import nn
from torch.nn import functional

from lightning_compress.quantization.description import WeightSpec
from lightning_compress.quantization.lowering.deployed_model import DeployedModel


class Quantizer(nn.Module):
    """An affine grid of `bits` bits from `quant_min` to `quant_max`, with zero on it."""

    def __init__(self, quant_min, quant_max, bits=8):
        super().__init__()
        highest = 2**bits - 1
        scale = torch.tensor((quant_max - quant_min) / highest, dtype=torch.float32)
        zero_point = round(-quant_min / float(scale))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32))
        self.limits = None if bits == 8 else (-zero_point * float(scale), (highest - zero_point) * float(scale))

    def forward(self, values):
        if self.limits is not None:
            values = values.clamp(*self.limits)
        return torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero_point, 0, 255)


def affine(weight, bits=8, granularity="channel", axis=0, group=0):
    """The symmetric grid of a weight."""
    quant_max = 2 ** (bits - 1) - 1
    by_channel = weight.detach().transpose(0, axis).reshape(weight.shape[axis], -1)
    if granularity == "tensor":
        scale = by_channel.abs().max() / quant_max
        codes = (weight.detach() / scale).round()
        return WeightSpec(codes.to(torch.int32), scale, bits)
    if group:
        rows = by_channel.reshape(len(by_channel), -1, group)
        scale = rows.abs().amax(2) / quant_max
        grid = WeightSpec(torch.zeros(weight.shape, dtype=torch.int32), scale, bits, axis, group)
        return WeightSpec((weight.detach() / grid.full_scale()).round().to(torch.int32), scale, bits, axis, group)
    scale = by_channel.abs().amax(1).clamp_min(1e-9) / quant_max
    scale = scale.reshape([-1 if place == axis else 1 for place in range(weight.ndim)])
    return WeightSpec((weight.detach() / scale).round().to(torch.int32), scale, bits, axis)


def deployable(module, *, only=None, **kwargs):
    """Put the weights of a module on grids, those whose names end in `only` or all with two axes or more."""
    weights = {}
    for name, weight in module.named_parameters():
        if weight.ndim > 1 and (only is None or name.endswith(only)):
            owner = module.get_submodule(name.rpartition(".")[0])
            transposed = isinstance(owner, nn.ConvTranspose1d | nn.ConvTranspose2d)
            weights[name] = affine(weight, axis=int(transposed), **kwargs)
            weight.data.copy_(weights[name].values())
    return DeployedModel(module.eval(), weights)


def with_levels(module, name, levels):
    """Put one weight of a module on the nearest of some levels."""
    weight = module.get_parameter(name)
    levels = torch.as_tensor(levels, dtype=torch.float32)
    grid = WeightSpec((weight.detach()[..., None] - levels).abs().argmin(-1), None, 8, levels=levels)
    weight.data.copy_(grid.values())
    return grid


class LeNet(nn.Module):
    """Two convolutions with ReLU and pooling, and two linear layers."""

    def __init__(self, bits=8):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 5), nn.Conv2d(8, 16, 5)
        self.fc1, self.fc2 = nn.Linear(256, 64), nn.Linear(64, 10)
        self.quantizers = nn.ModuleDict({
            "input": Quantizer(-3.0, 3.0), "conv1": Quantizer(0.0, 2.0, bits), "conv2": Quantizer(0.0, 1.0, bits),
            "fc1": Quantizer(0.0, 0.6, bits),
        })  # fmt: skip

    def forward(self, image):
        steps = self.quantizers
        hidden = functional.max_pool2d(steps["conv1"](self.conv1(steps["input"](image)).relu()), 2)
        hidden = functional.max_pool2d(steps["conv2"](self.conv2(hidden).relu()), 2)
        return self.fc2(steps["fc1"](self.fc1(hidden.flatten(1)).relu()))


class Residual(nn.Module):
    """A block whose two ways are added, with a depthwise convolution in one, then pooling over the whole image."""

    def __init__(self, output_quantizer=True):
        super().__init__()
        self.first, self.depthwise = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)
        self.quantizers = nn.ModuleDict({
            "input": Quantizer(-3.0, 3.0), "first": Quantizer(0.0, 2.0), "depthwise": Quantizer(0.0, 1.0),
            "point": Quantizer(-1.0, 1.0) if output_quantizer else nn.Identity(), "sum": Quantizer(0.0, 2.0),
            "pooled": Quantizer(0.0, 1.0),
        })  # fmt: skip

    def forward(self, image):
        steps = self.quantizers
        trunk = steps["first"](self.first(steps["input"](image)).relu())
        branch = steps["depthwise"](functional.relu6(self.depthwise(trunk)))
        trunk = steps["sum"]((trunk + steps["point"](self.point(branch))).relu())
        return self.head(steps["pooled"](trunk.mean((2, 3))))


class Perceptron(nn.Module):
    """Three linear layers, the middle one without a bias."""

    def __init__(self, width=64):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(32, width), nn.Linear(width, width, bias=False), nn.Linear(width, 4)
        self.quantizers = nn.ModuleDict(
            {"one": Quantizer(-3.0, 3.0), "two": Quantizer(0.0, 2.0), "three": Quantizer(0.0, 1.5)}
        )

    def forward(self, values):
        steps = self.quantizers
        hidden = self.two(steps["two"](self.one(steps["one"](values)).relu())).relu()
        return self.three(steps["three"](hidden))


class Transformer(nn.Module):
    """An embedding, one block with attention, LayerNorm and GELU, and a head."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head, self.heads = nn.Linear(width, 7), heads
        self.quantizers = nn.ModuleDict({
            "qkv": Quantizer(-4.0, 4.0), "out": Quantizer(-2.0, 2.0), "up": Quantizer(-4.0, 4.0),
            "down": Quantizer(-0.2, 2.0), "head": Quantizer(-2.0, 2.0),
        })  # fmt: skip

    def forward(self, tokens):
        steps, hidden = self.quantizers, self.embedding(tokens)
        batch, length, width = hidden.shape
        mixed = self.qkv(steps["qkv"](self.before(hidden))).reshape(batch, length, 3, self.heads, width // self.heads)
        attended = functional.scaled_dot_product_attention(*mixed.permute(2, 0, 3, 1, 4))
        hidden = hidden + self.out(steps["out"](attended.transpose(1, 2).reshape(batch, length, width)))
        hidden = hidden + self.down(steps["down"](functional.gelu(self.up(steps["up"](self.after(hidden))))))
        return self.head(steps["head"](hidden.mean(1)))


class Attention(nn.Module):
    """torch's own attention, behind an embedding; weights only."""

    def __init__(self):
        super().__init__()
        self.embedding, self.attention = nn.Embedding(50, 32), nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        return self.attention(hidden, hidden, hidden, need_weights=False)[0]


class Recurrent(nn.Module):
    """A recurrent layer and a head on its last output; weights only."""

    def __init__(self, kind=nn.LSTM, **kwargs):
        super().__init__()
        self.layer = kind(16, 24, batch_first=True, **kwargs)
        self.head = nn.Linear(24 * (1 + self.layer.bidirectional), 5)

    def forward(self, sequence):
        return self.head(self.layer(sequence)[0][:, -1])


class Decoder(nn.Module):
    """A convolution down and a transposed one up again."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1)
        self.quantizers = nn.ModuleDict({"input": Quantizer(-3.0, 3.0), "down": Quantizer(0.0, 2.0)})

    def forward(self, image):
        steps = self.quantizers
        return self.up(steps["down"](self.down(steps["input"](image)).relu()))


class Padded(nn.Module):
    """Convolutions whose inputs are padded by other means than their own zeros."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect"), nn.Conv2d(16, 8, 3)
        self.quantizers = nn.ModuleDict(
            {"input": Quantizer(-3.0, 3.0), "one": Quantizer(0.0, 2.0), "two": Quantizer(-2.0, 2.0)}
        )

    def forward(self, image):
        steps = self.quantizers
        hidden = steps["one"](self.one(steps["input"](image)).relu())
        return steps["two"](self.two(functional.pad(hidden, (0, 1, 0, 1))))


class Keywords(nn.Module):
    """Takes two tensors and a number, and gives two tensors by name; one quantizer is called twice."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(64, 64), nn.Linear(64, 64)
        self.quantizers = nn.ModuleDict({"both": Quantizer(-4.0, 4.0)})

    def forward(self, image, factor=1.0, mask=None):
        left, right = self.left(self.quantizers["both"](image)), self.right(self.quantizers["both"](image * mask))
        return {"sum": left + factor * right, "left": left}
