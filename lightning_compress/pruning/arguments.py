"""What the arguments of pruning must be like, checked before anything is trained."""

from typing import Any

from lightning_compress.core.registry import near_miss
from lightning_compress.nn.selection import Selection, as_patterns, pattern_matches
from lightning_compress.pruning.functional import distributions
from lightning_compress.pruning.granularity import NOfM


def check_pattern(pruning: Any) -> None:
    """Refuse what an N:M pattern leaves no choice about.

    Raises:
        ValueError: if the sparsity is not that of the pattern, or layers should differ.
    """
    pattern = pruning.granularity_spec
    if not isinstance(pattern, NOfM):
        return
    share = (pattern.m - pattern.n) / pattern.m
    if abs(pruning.final_sparsity - share) > 1e-9:
        raise ValueError(
            f"granularity '{pruning.granularity}' prunes exactly {share} of the weights, but final_sparsity is "
            f"{pruning.final_sparsity}. Write final_sparsity={share}."
        )
    if pruning.distribution is not distributions.uniform or pruning.overrides or pruning.min_density:
        raise ValueError(
            f"granularity '{pruning.granularity}' fixes the sparsity of every layer, so it takes distribution='uniform'"
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
