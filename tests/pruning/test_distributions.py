import math

import pytest
import torch

from lightning_compress.pruning.distributions import erk, global_, lamp, uniform


def random_scores(seed, ties=False):
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.rand(size, generator=generator) for name, size in {"a": 7, "b": 40, "c": 3}.items()}
    return {name: (value * 4).round() for name, value in scores.items()} if ties else scores


def about(scores):
    return {"sizes": {name: len(value) for name, value in scores.items()}, "costs": dict.fromkeys(scores, 1)}


def test_uniform_prunes_the_same_share_of_each_layer():
    assert uniform({"a": 10, "b": 7}, sparsity=0.5) == {"a": 5, "b": 3}  # round(3.5) is 4


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.99])
def test_global_keeps_the_highest_of_all_exactly(sparsity, ties):
    for seed in range(5):
        scores = random_scores(seed, ties)
        kept = global_(scores, sparsity=sparsity, **about(scores))
        order = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
        budget = 50 - round(sparsity * 50)
        owner = torch.tensor([0] * 7 + [1] * 40 + [2] * 3)[order[:budget]]
        assert list(kept.values()) == [int((owner == place).sum()) for place in range(3)]
        assert sum(kept.values()) == budget


def test_global_counts_weights_not_units():
    scores = {"small": torch.tensor([1.0, 2.0, 3.0, 4.0]), "big": torch.tensor([2.5, 0.5])}
    kept = global_(scores, costs={"small": 1, "big": 4}, sizes={"small": 4, "big": 2}, sparsity=0.5)
    assert kept == {"small": 2, "big": 1}  # 4, 3 and the block of 2.5 make 6 of 12 weights


def test_lamp_is_the_papers_double_loop():
    for seed in range(5):
        scores = random_scores(seed)
        ranked = []
        for name, layer in scores.items():
            for value in layer.double():
                outliving = sum(float(other) ** 2 for other in layer.double() if other >= value)
                ranked.append((float(value) ** 2 / outliving, name))
        best = [name for _, name in sorted(ranked, reverse=True)[:20]]
        kept = lamp(scores, sparsity=0.6, **about(scores))
        assert kept == {name: best.count(name) for name in scores}


def test_lamp_does_not_count_what_is_pruned_already():
    scores = {"a": torch.tensor([-math.inf, 3.0, 4.0]), "b": torch.tensor([1.0, 1.0, 2.0])}
    # 9 / 25 and 16 / 16; 1 / 6, 1 / 5 and 4 / 4: equal scores count in the order of their indices.
    assert lamp(scores, sparsity=0.5, **about(scores)) == {"a": 2, "b": 1}


def test_erk_solves_the_papers_equation():
    shapes = {"a": torch.Size([10, 20]), "b": torch.Size([30, 10, 3, 3])}
    sizes, costs = {"a": 200, "b": 2700}, {"a": 1, "b": 1}
    # Densities e * 30/200 and e * 46/2700 of 200 and 2700 weights are 290 of them: e = 290 / 76.
    kept = erk(shapes, sizes, costs, sparsity=0.9)
    assert sum(kept.values()) == 290
    assert kept["a"] == pytest.approx(30 * 290 / 76, abs=1)
    assert kept["b"] == pytest.approx(46 * 290 / 76, abs=1)


def test_erk_keeps_a_layer_whole_rather_than_more_than_whole():
    shapes = {"tiny": torch.Size([2, 2]), "large": torch.Size([100, 100])}
    kept = erk(shapes, {"tiny": 4, "large": 10000}, {"tiny": 1, "large": 1}, sparsity=0.9)
    assert kept["tiny"] == 4
    assert sum(kept.values()) == 10004 - round(0.9 * 10004)
