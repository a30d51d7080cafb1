"""Deployables by hand: modules with weights on symmetric grids, and what is read of their files."""

import torch
from torch import nn

from lightning_compress.quantization.description import WeightSpec
from lightning_compress.quantization.lowering.deployed_model import DeployedModel


class Step(nn.Module):
    """A quantizer of activations, as deployables have them."""

    def __init__(self, zero_point=0):
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.05))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32))

    def forward(self, values):
        return torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero_point, 0, 255)


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, values, mask=None, scale=1.0):
        hidden = self.layer(values) * scale
        return hidden if mask is None else hidden.masked_fill(mask, 0.0)


def grid_of(weight, bits, axis=0, group=0):
    """Weight on a symmetric grid, by definition."""
    quant_max = 2 ** (bits - 1) - 1
    if group:
        by_group = weight.transpose(0, axis).reshape(weight.shape[axis], -1, group)
        scale = by_group.abs().amax(2) / quant_max
        swapped = weight.transpose(0, axis).shape
        codes = (by_group / scale.unsqueeze(2)).round().reshape(swapped).transpose(0, axis)
    else:
        dims = [dim for dim in range(weight.ndim) if dim != axis]
        scale = weight.abs().amax(dims, keepdim=True) / quant_max
        codes = (weight / scale).round()
    return WeightSpec(codes.to(torch.int32), scale, bits, axis, group)


def deployed(module, bits=8, group=0):
    """The module with all its matrices on grids."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in module.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
    axes = {f"{name}.weight": 1 for name, one in module.named_modules() if isinstance(one, nn.ConvTranspose2d)}
    module.eval().requires_grad_(False)
    grids = {}
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and "weight" in name:
            grids[name] = grid_of(parameter, bits, axes.get(name, 0), group)
            parameter.copy_(grids[name].values())
    return DeployedModel(module, grids)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens(*shape):
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(1))


def loaded(path):
    return torch.export.load(path).module()


def weights_in(path):
    return torch.export.load(path).state_dict


def in_the_middle(compute):
    class Middle(nn.Module):
        def forward(self, values):
            return compute(values)

    return deployed(nn.Sequential(nn.Linear(8, 4), Middle()))
