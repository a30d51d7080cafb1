"""A toy of low rank: at its end, Linear layers become two of a lower rank each, by SVD."""

import torch

from lightning_compress.nn.replacement import Replacement, builder_path, torch_layers
from lightning_compress.training.structural_callback import ModuleChange, StructuralCallback


class LowRank(StructuralCallback):
    """Each step that is due factors the next of the `layers`."""

    def __init__(self, rank=2, layers=("net.0",), begin=4, end=10, every=2, name="low_rank"):
        super().__init__(name, begin, end, every)
        self.rank, self.layers = rank, layers

    def replaced_modules(self, pl_module):
        return self.layers

    def change_structure(self, trainer, pl_module, moment):
        if len(self.replaced) < len(self.layers):
            name = self.layers[len(self.replaced)]
            self.replace_modules(trainer, pl_module, [ModuleChange(self.plan(pl_module, name), by_svd)])

    def plan(self, pl_module, name):
        old = pl_module.get_submodule(name)
        layers = [
            ("Linear", {"in_features": old.in_features, "out_features": self.rank, "bias": False}),
            ("Linear", {"in_features": self.rank, "out_features": old.out_features}),
        ]
        return Replacement(name, builder_path(torch_layers), {"layers": layers})


def by_svd(old, new):
    u, s, v = torch.linalg.svd(old.weight, full_matrices=False)
    rank = new[0].out_features
    new[0].weight.copy_(s[:rank, None].sqrt() * v[:rank])
    new[1].weight.copy_(u[:, :rank] * s[:rank].sqrt())
    new[1].bias = old.bias
