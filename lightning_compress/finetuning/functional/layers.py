"""Warm-up, the order in which layers unfreeze, and learning rates that fall from the head to the input."""

from collections.abc import Iterable, Sequence


def warm_up(step: int, steps: int) -> float:
    """The share of the learning rate at a step of the phase, the first of which is 0: `(step + 1) / steps`, at most 1.

    >>> [warm_up(step, 4) for step in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return min(1.0, (step + 1) / steps) if steps else 1.0


def unfreeze_times(begin: int, end: int, layers: int) -> list[int]:
    """When each of `layers` unfreezes, from the head down: at equal distances, none at `begin` or `end`.

    >>> unfreeze_times(begin=10, end=40, layers=2)
    [20, 30]
    """
    return [begin + -(-(end - begin) * place // (layers + 1)) for place in range(1, layers + 1)]


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: its name up to the first number, or else that of its module.

    >>> [layer_of(name) for name in ("encoder.layer.3.attention.key.weight", "net.0.weight", "head.bias", "scale")]
    ['encoder.layer.3', 'net.0', 'head', 'scale']
    """
    parts = name.split(".")
    numbered = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    if numbered is not None:
        return ".".join(parts[: numbered + 1])
    return ".".join(parts[:-1]) or name


def group_by_layer(names: Iterable[str]) -> list[list[str]]:
    """Names of parameters by layer, in the order in which the layers first come.

    >>> group_by_layer(["stem.weight", "block.0.a.weight", "block.0.b.weight", "block.1.a.weight", "head.weight"])
    [['stem.weight'], ['block.0.a.weight', 'block.0.b.weight'], ['block.1.a.weight'], ['head.weight']]
    """
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    return list(layers.values())


def layer_decay_multipliers(layers: Sequence[Sequence[str]], decay: float) -> dict[str, float]:
    """The factor of each parameter's learning rate: 1 in the last layer, times `decay` for each layer before it.

    Reference: Clark et al., 2020, appendix B, https://arxiv.org/abs/2003.10555

    >>> layer_decay_multipliers([["stem"], ["block.a", "block.b"], ["head"]], 0.5)
    {'stem': 0.25, 'block.a': 0.5, 'block.b': 0.5, 'head': 1.0}
    """
    return {name: decay ** (len(layers) - 1 - depth) for depth, layer in enumerate(layers) for name in layer}
