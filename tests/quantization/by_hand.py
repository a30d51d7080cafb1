"""Fake quantization written by hand with torch's own operators, and networks that use it in their forward."""

import torch
from torch import nn
from torch.nn import functional

from lightning_compress.nn.dataflow import trace_dataflow
from lightning_compress.quantization.config import QuantizationConfig
from lightning_compress.quantization.layers import quantizable_layers
from lightning_compress.quantization.placement.layout import place_activations
from lightning_compress.quantization.quantized_model import QuantizedModel


def on_grid(weight, axis=0, quant_max=127):
    """A weight on a symmetric grid for each of its output channels."""
    others = tuple(place for place in range(weight.ndim) if place != axis)
    scale = weight.detach().abs().amax(others).float() / quant_max
    zeros = torch.zeros(len(scale), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zeros, axis, -quant_max, quant_max)


class Place:
    """An activation's grid of 8 bits over the range of what comes first, moved by a hundredth to what comes later."""

    def __init__(self):
        self.range, self.scale, self.follows = None, None, True

    def __call__(self, values):
        if self.follows:
            found = values.detach().min().float(), values.detach().max().float()
            old = self.range or found
            self.range = tuple(torch.lerp(one, other, 0.01) for one, other in zip(old, found, strict=True))
        quant_min, quant_max = self.range[0].clamp(max=0), self.range[1].clamp(min=0)
        self.scale = scale = quant_max / 255 - quant_min / 255
        return torch.fake_quantize_per_tensor_affine(
            values, scale, (-(quant_min / scale).round()).to(torch.int32), 0, 255
        )


def whole(layer, place, bias=None, quant_max=127):
    """In evaluation, a bias that is a whole number of steps of the layer's product; in training as it is."""
    bias = layer.bias if bias is None else bias
    if layer.training:
        return bias
    step = (layer.weight.detach().abs().flatten(1).amax(1) / quant_max).double() * place.scale.double()
    return ((bias.double() / step).round() * step).to(bias.dtype)


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def request(**settings):
    return QuantizationConfig(**{"first": "same", "last": "same", "reduce_range": False, **settings})


def quantized(model, *inputs, active=True, layers=None, **settings):
    """A model with its quantizers installed after one watched step, and those: as in the middle of training."""
    layers = quantizable_layers(model)[1] if layers is None else layers
    asked = request(**settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad(), trace_dataflow(model) as flow:
        output = model(*inputs)
        (output[0] if isinstance(output, tuple) else output).square().mean()
    model.load_state_dict(before)  # the running statistics of a BatchNorm
    found = QuantizedModel(model, layers, asked, place_activations(flow, model, layers, asked))
    if active:
        found.begin()
        found.state.fake_quant_enabled, found.state.observer_enabled = True, True
    found.install()
    return found


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, values):
        return self.net(values)

    def hands(self):
        places = first, second = Place(), Place()

        def forward(values):
            given = first(values)
            inner = functional.linear(given, on_grid(self.net[0].weight), whole(self.net[0], first)).relu()
            given = second(inner)
            return functional.linear(given, on_grid(self.net[2].weight), whole(self.net[2], second))

        forward.places = places
        return forward


class Convolutional(nn.Module):
    """A convolution with BatchNorm, one by groups, and a transposed one."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.deep, self.up, self.head = nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 3, 2), nn.Linear(3, 2)
        self.act1, self.act2, self.act3 = nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU()

    def forward(self, images):
        images = self.act2(self.deep(self.act1(self.norm(self.conv(images)))))
        return self.head(self.act3(self.up(images)).mean((2, 3)))

    def hands(self):
        places = [Place() for _ in range(5)]

        def forward(images):
            conv = functional.conv2d(places[0](images), on_grid(self.conv.weight))
            if not self.training:
                # What BatchNorm adds, before it multiplies.
                offset = self.norm.bias / self.norm.weight * (self.norm.running_var + self.norm.eps).sqrt()
                offset = offset.detach() - self.norm.running_mean
                conv = conv + (whole(self.conv, places[0], offset) - offset).reshape(-1, 1, 1)
            inner = places[1](self.norm(conv).relu())
            bias = whole(self.deep, places[1])
            inner = places[2](functional.conv2d(inner, on_grid(self.deep.weight), bias, groups=4).relu())
            inner = functional.conv_transpose2d(inner, on_grid(self.up.weight, axis=1), self.up.bias).relu()
            inner = places[4](places[3](inner).mean((2, 3)))
            return functional.linear(inner, on_grid(self.head.weight), whole(self.head, places[4]))

        forward.places = places
        return forward


class Tied(nn.Module):
    """A language model: the head holds the embedding's parameter."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(7, 6), nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.inner(self.embedding(tokens)).tanh())

    def hands(self):
        places = first, second = Place(), Place()

        def forward(tokens):
            embedded = functional.embedding(tokens, on_grid(self.embedding.weight))
            given = first(embedded)
            inner = functional.linear(given, on_grid(self.inner.weight), whole(self.inner, first)).tanh()
            return functional.linear(second(inner), on_grid(self.embedding.weight))

        forward.places = places
        return forward


class Doubling(nn.Linear):
    """A layer of the user's own with a forward of its own."""

    def forward(self, values):
        return functional.linear(values, 2 * self.weight, self.bias)


class Twice(nn.Module):
    """A layer that is called twice, with an argument by its name; and one of the user's own."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), Doubling(6, 3)

    def forward(self, values):
        return self.head(self.layer(input=self.layer(values).sigmoid()))

    def hands(self):
        places = shared, last = Place(), Place()

        def layer(values):
            given = shared(values)
            return functional.linear(given, on_grid(self.layer.weight), whole(self.layer, shared))

        def forward(values):
            inner = layer(layer(values).sigmoid())
            given = last(inner)
            return functional.linear(given, 2 * on_grid(self.head.weight), whole(self.head, last))

        forward.places = places
        return forward
