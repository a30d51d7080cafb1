"""The weights of a model as the functions of pruning take them."""

from lightning_compress.nn.selection import select
from lightning_compress.pruning.allocation import Layers
from lightning_compress.pruning.granularity import parse


def layers_of(model, granularity="weight", targets=None):
    return Layers({one.name: one for one in select(model, targets).chosen}, parse(granularity))
