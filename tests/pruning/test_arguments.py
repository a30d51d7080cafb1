"""What the arguments of pruning must be like; each mend that an error tells of does mend it."""

import re

import pytest
from torch import nn

from lightning_compress.core.registry import check_signature, registered
from lightning_compress.nn.selection import select
from lightning_compress.pruning.arguments import check_pattern, overridden
from lightning_compress.pruning.functional import criteria, distributions


def pruning(granularity, final_sparsity, distribution=distributions.uniform, overrides=(), min_density=0.0):
    return granularity, final_sparsity, distribution, dict(overrides), min_density


@pytest.mark.parametrize("module", [criteria, distributions])
def test_all_that_ours_ask_for_is_offered(module):
    for function in registered(module).values():
        assert check_signature(function, module.OFFERED) is function


def test_what_nobody_gathers_is_refused_with_the_nearest_name():
    def own(weight, gradd, hessian=None): ...

    with pytest.raises(
        ValueError, match=r"own asks for 'gradd'.* Did you mean 'grad'\?.*\(weight, gradd, hessian=None"
    ):
        check_signature(own, criteria.OFFERED)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 2), (1, 3), (2, 3), (3, 7), (9, 10), (7, 16)], ids=str)
def test_the_sparsity_of_a_pattern_is_told_so_that_it_can_be_written(pattern):
    text = f"{pattern[0]}:{pattern[1]}"
    check_pattern(*pruning(text, 1 - pattern[0] / pattern[1]))
    with pytest.raises(ValueError, match=r"Write final_sparsity=") as error:
        check_pattern(*pruning(text, 0.123))
    check_pattern(*pruning(text, float(re.search(r"final_sparsity=([\d.]+\d)", str(error.value))[1])))


@pytest.mark.parametrize(
    "arguments",
    [{"distribution": distributions.erk}, {"overrides": {"0.weight": 0.3}}, {"min_density": 0.1}],
    ids=lambda one: next(iter(one)),
)
def test_a_pattern_leaves_no_other_choice(arguments):
    with pytest.raises(ValueError, match="'2:4' fixes the sparsity of every layer"):
        check_pattern(*pruning("2:4", 0.5, **arguments))
    check_pattern(*pruning("weight", 0.5, **arguments))


def network():
    return select(nn.Sequential(nn.Linear(2, 2), nn.Conv1d(2, 2, 2), nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, {}),
        ({"0": 0.1, "Linear": 0.2}, {"0.weight": 0.1, "2.weight": 0.2}),
        ({"Linear": 0.2, "0": 0.1}, {"0.weight": 0.2, "2.weight": 0.2}),
        ({"re:[12].*": 0.0, "*": 0.5}, {"0.weight": 0.5, "1.weight": 0.0, "2.weight": 0.0}),
    ],
)
def test_the_first_override_that_matches_counts(overrides, expected):
    assert overridden(overrides, network()) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("1.weigth", "'1.weigth' matches no pruned weight. Did you mean '1.weight'.* There are 0.weight, 1.weight"),
        ("0.bias", "matches no pruned weight"),
        ("re:(", "no regular expression"),
        ("", "'' is no pattern"),
    ],
)
def test_an_override_that_means_nothing_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        overridden({pattern: 0.3}, network())
