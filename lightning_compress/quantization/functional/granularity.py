"""How a weight is cut into rows of numbers that share one scale."""

import re
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ChannelGroups:
    """The cut of one weight: whole, by channel of the output, or by group of inputs within a channel.

    Attributes:
        shape: of the weight.
        axis: along which its output channels lie; 1 for transposed convolutions, else 0.
        group: how many inputs share a scale; 0 for a whole channel, -1 for the whole tensor.

    >>> import torch
    >>> ChannelGroups((4, 6), group=3).split(torch.zeros(4, 6)).shape
    torch.Size([8, 3])
    """

    shape: tuple[int, ...]
    axis: int = 0
    group: int = 0

    def split(self, weight: Tensor) -> Tensor:
        """The weight as a matrix `(rows, elements)`."""
        if self.group < 0:
            return weight.reshape(1, -1)
        by_channel = weight.transpose(0, self.axis) if self.axis else weight
        return by_channel.reshape(-1, self.group) if self.group else by_channel.reshape(len(by_channel), -1)

    def join(self, matrix: Tensor) -> Tensor:
        """The matrix as a weight again."""
        if self.group < 0 or not self.axis:
            return matrix.reshape(self.shape)
        swapped = list(self.shape)
        swapped[0], swapped[self.axis] = swapped[self.axis], swapped[0]
        return matrix.reshape(swapped).transpose(0, self.axis)

    def scale(self, scale: Tensor) -> Tensor:
        """A scale for each row, as it broadcasts to the weight; by group `(channels, groups)`, which does not."""
        if self.group < 0:
            return scale.reshape(())
        if self.group:
            return scale.reshape(self.shape[self.axis], -1)
        return scale.reshape([-1 if place == self.axis else 1 for place in range(len(self.shape))])


def check_granularity(granularity: str) -> int:
    """The group that a granularity means: "tensor", "channel" or "group 32".

    Raises:
        ValueError: if it is none of these.

    >>> [check_granularity(name) for name in ("tensor", "channel", "group 32")]
    [-1, 0, 32]
    """
    known = {"tensor": -1, "channel": 0}
    if granularity in known:
        return known[granularity]
    match = re.fullmatch(r"group (\d+)", granularity) if isinstance(granularity, str) else None
    if match is None or int(match[1]) < 2:
        raise ValueError(
            f"granularity is 'tensor', 'channel' or 'group 32' (weights that share a scale), but is {granularity!r}."
        )
    return int(match[1])


def split_channels(name: str, shape: tuple[int, ...], granularity: str, axis: int = 0) -> ChannelGroups:
    """The cut of a weight of that shape.

    Raises:
        ValueError: if its channels do not divide into groups of the wanted size.

    >>> split_channels("fc.weight", (4, 6), "group 3")
    ChannelGroups(shape=(4, 6), axis=0, group=3)
    """
    group = check_granularity(granularity)
    inputs = 1
    for place, size in enumerate(shape):
        inputs *= size if place != axis else 1
    if group > 0 and inputs % group:
        fitting = [size for size in range(2, inputs + 1) if inputs % size == 0]
        near = min(fitting, key=lambda size: abs(size - group))
        raise ValueError(
            f"granularity '{granularity}' does not fit {name}: its channels have {inputs} inputs. Write 'group {near}' "
            f"or, for this layer alone, overrides={{'{name}': {{'granularity': 'channel'}}}}."
        )
    return ChannelGroups(tuple(shape), axis, group)
