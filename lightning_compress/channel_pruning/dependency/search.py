"""The groups of a module, observed on as little as it takes, and verified on the whole example."""

from typing import Any

from torch import nn

from lightning_compress.channel_pruning.dependency.graph import build_dependency_graph
from lightning_compress.channel_pruning.dependency.verification import verified_groups
from lightning_compress.channel_pruning.functional.groups import ChannelGroup
from lightning_compress.nn.example_inputs import crop_images, describe_shapes

SIDES = (32, 64)  # pixels: observing takes time in proportion to the values in the module


def find_groups(model: nn.Module, example: Any) -> tuple[list[ChannelGroup], Any]:
    """What can be cut out of a module together, as far as verification on the example bears it out.

    Returns:
        The groups, and the example as large as it takes to see them: images of 32 or 64 pixels, if the module takes
        these and the groups hold on the whole ones.

    Raises:
        ValueError: if a layer is lazy.
        Exception: what the module raises when it is called.
    """
    for side in SIDES:
        small = crop_images(example, side)
        if describe_shapes(small) == describe_shapes(example):
            break
        try:
            observed = build_dependency_graph(model, small)
        except Exception:  # whatever the user's code says to smaller images
            continue
        found = verified_groups(model, example, observed)
        if 0 < _free(found) == _free(observed):
            return found, small
    return verified_groups(model, example, build_dependency_graph(model, example)), example


def _free(groups: list[ChannelGroup]) -> int:
    return sum(group.unprunable_reason is None for group in groups)
