"""What the arguments of pruning must be like, checked before anything is trained."""

from collections.abc import Callable, Mapping

from lightning_compress.core.registry import near_miss
from lightning_compress.nn.selection import Selection, as_patterns, pattern_matches
from lightning_compress.pruning.functional import distributions
from lightning_compress.pruning.granularity import NOfM, parse_granularity


def check_pattern(
    granularity: str,
    final_sparsity: float,
    distribution: Callable[..., dict[str, int]],
    overrides: Mapping[str, float],
    min_density: float,
) -> None:
    """Refuse what an N:M pattern leaves no choice about.

    Raises:
        ValueError: if the sparsity is not that of the pattern, or layers should differ.
    """
    pattern = parse_granularity(granularity)
    if not isinstance(pattern, NOfM):
        return
    share = (pattern.m - pattern.n) / pattern.m
    if abs(final_sparsity - share) > 1e-9:
        raise ValueError(
            f"granularity '{granularity}' prunes exactly {share} of the weights, but final_sparsity is "
            f"{final_sparsity}. Write final_sparsity={share}."
        )
    if distribution is not distributions.uniform or overrides or min_density:
        raise ValueError(
            f"granularity '{granularity}' fixes the sparsity of every layer, so it takes distribution='uniform'"
            f" and neither overrides nor min_density. To leave a layer dense, name it in ignore."
        )


def overridden(overrides: dict[str, float], selection: Selection) -> dict[str, float]:
    """The sparsity of each weight that an override names; the first match counts.

    Raises:
        ValueError: if a pattern matches no pruned weight.
    """
    found: dict[str, float] = {}
    for pattern, sparsity in overrides.items():
        (checked,) = as_patterns(pattern)
        named = [one.name for one in selection.chosen if pattern_matches(checked, one)]
        if not named:
            known = [one.name for one in selection.chosen]
            raise ValueError(
                f"overrides: '{pattern}' matches no pruned weight.{near_miss(pattern, known)} There are "
                f"{', '.join(known)}."
            )
        for name in named:
            found.setdefault(name, sparsity)
    return found
