"""The weights of a model as the functions of pruning take them."""

from lightning_compress.nn.selection import select
from lightning_compress.pruning.allocation import PrunableLayers
from lightning_compress.pruning.granularity import parse_granularity


def layers_of(model, granularity="weight", targets=None):
    return PrunableLayers({one.name: one for one in select(model, targets).chosen}, parse_granularity(granularity))
