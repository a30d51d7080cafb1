"""The highest scores against sorting, where floats are at their worst: ties, infinities, zeros, half precision."""

import math

import pytest
import torch

from lightning_compress.pruning.functional import topk as ranking
from lightning_compress.pruning.functional.topk import Threshold, count_kept, global_threshold, sort_keys, top_k_mask

CHUNKS = (1, 3, 7, 1 << 20)
INF = float("inf")


@pytest.fixture(params=CHUNKS)
def chunk(request, monkeypatch):
    monkeypatch.setattr(ranking, "CHUNK", request.param)


def sorted_mask(scores, kept):
    """The same by a stable sort."""
    flat = scores.float().reshape(-1).tolist()
    best = sorted(range(len(flat)), key=lambda index: (-flat[index], index))[:kept]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[best] = True
    return mask.view(scores.shape)


def filled(tensors, budget):
    """Entries kept of each tensor: value by value from the top; of the value that no longer fits, in order."""
    counts = [0] * len(tensors)
    for value in sorted({score for scores, _ in tensors for score in scores.tolist()}, reverse=True):
        equal = [scores.tolist().count(value) for scores, _ in tensors]
        price = sum(count * cost for count, (_, cost) in zip(equal, tensors, strict=True))
        if price > budget:
            for index, (_, cost) in enumerate(tensors):
                fitting = min(equal[index], budget // cost)
                counts[index] += fitting
                budget -= fitting * cost
            return counts
        counts = [count + more for count, more in zip(counts, equal, strict=True)]
        budget -= price
    return counts


def selected(tensors, kept):
    threshold, counts = global_threshold(lambda: tensors, kept), []
    for scores, cost in tensors:
        count, threshold = count_kept(scores, threshold, cost)
        counts.append(count)
    return counts


def test_keys_are_in_the_order_of_the_numbers():
    tiny = torch.finfo(torch.float32).tiny
    numbers = [-INF, -3.4e38, -1.5, -1.0, -tiny, -1e-45, 0.0, 1e-45, tiny, 1.0, 1.0 + 2**-23, 3.4e38, INF]
    ordered = sort_keys(torch.tensor(numbers)).tolist()
    assert ordered == sorted(set(ordered))
    assert sort_keys(torch.tensor([-0.0])) == sort_keys(torch.tensor([0.0]))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("levels", [3, 50, None], ids=["many-ties", "some-ties", "distinct"])
def test_the_mask_is_that_of_a_stable_sort(levels):
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 20, 41):
        scores = torch.randn(size, generator=generator)
        scores = scores if levels is None else (scores * levels / 4).round() / levels
        for kept in {0, 1, size // 3, size - 1, size}:
            mask = top_k_mask(scores, kept)
            assert torch.equal(mask, sorted_mask(scores, kept)), (size, kept)
            assert mask.sum() == kept


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(
    "numbers",
    [
        [1.0] * 9,
        [-INF] * 9,
        [INF] * 9,
        [-INF, 3.0, INF, -INF, 3.0, INF, -1.0, -0.0, 0.0],
        [0.0, -0.0, 0.0, -0.0],
        [1e-45, 0.0, -1e-45, 2e-45],
        [3.4e38, -3.4e38, INF, -INF],
        [-5.0, -4.0, -3.0, -3.0, -4.0],
    ],
    ids=str,
)
def test_ties_zeros_and_infinities_go_by_their_order(numbers):
    scores = torch.tensor(numbers)
    for kept in range(len(numbers) + 1):
        assert torch.equal(top_k_mask(scores, kept), sorted_mask(scores, kept)), kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scores_of_other_types_are_ranked_as_float32(dtype):
    scores = torch.randn(11, 13, generator=torch.Generator().manual_seed(0)).to(dtype)
    for kept in (0, 1, 50, 143):
        assert torch.equal(top_k_mask(scores, kept), sorted_mask(scores, kept))


def test_what_float32_cannot_tell_apart_is_a_tie():
    scores = torch.tensor([1.0, 1.0 + 1e-12, 1e300, 2e300], dtype=torch.float64)
    assert top_k_mask(scores, 1).tolist() == [False, False, True, False]
    assert top_k_mask(scores, 3).tolist() == [True, False, True, True]


def test_the_order_is_that_of_the_indices_and_not_of_the_memory():
    scores = torch.arange(12.0).view(3, 4).t().contiguous().t()
    assert top_k_mask(scores, 2).tolist() == [[False] * 4, [False] * 4, [False, False, True, True]]
    assert top_k_mask(torch.zeros(2, 3).t(), 2).tolist() == [[True, True], [False, False], [False, False]]


@pytest.mark.usefixtures("chunk")
def test_counts_over_many_tensors_are_exact():
    generator = torch.Generator().manual_seed(1)
    for trial in range(6):
        sizes = torch.randint(1, 30, (5,), generator=generator).tolist()
        tensors = [((torch.randn(size, generator=generator) * 3).round() / 3, 1) for size in sizes]
        tensors[trial % 5][0][::2] = -INF
        scores = torch.cat([one for one, _ in tensors])
        for kept in {0, 1, len(scores) // 2, len(scores) - 1, len(scores)}:
            expected = [int(part.sum()) for part in sorted_mask(scores, kept).split(sizes)]
            assert selected(tensors, kept) == expected
            assert sum(expected) == kept


@pytest.mark.usefixtures("chunk")
def test_with_costs_as_much_is_kept_as_fits():
    generator = torch.Generator().manual_seed(2)
    for _ in range(6):
        costs = torch.randint(1, 9, (4,), generator=generator).tolist()
        tensors = [((torch.randn(12, generator=generator) * 2).round(), cost) for cost in costs]
        total = sum(12 * cost for cost in costs)
        for kept in {0, 1, total // 3, total // 2, total - 1, total}:
            counts = selected(tensors, kept)
            assert counts == filled(tensors, kept)
            assert sum(count * cost for count, cost in zip(counts, costs, strict=True)) <= kept


def test_a_tie_that_does_not_fit_is_left_to_the_next_tensor():
    # 7 to spend: 2.0 costs 1; then three of 1.0 cost 4 each, of which one fits; the 2 left buy both of the second.
    tensors = [(torch.tensor([1.0, 1.0, 1.0]), 4), (torch.tensor([1.0, 2.0, 1.0, 0.0]), 1)]
    assert selected(tensors, 7) == [1, 3]


def test_keeping_nothing_and_having_nothing():
    assert selected([(torch.tensor([1.0, 2.0]), 1), (torch.tensor([INF]), 1)], 0) == [0, 0]
    assert top_k_mask(torch.empty(0, 3), 0).shape == (0, 3)
    assert selected([(torch.empty(0), 1), (torch.tensor([5.0]), 1)], 1) == [0, 1]


def test_the_threshold_is_the_key_of_the_last_one_kept():
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0])
    assert global_threshold(lambda: [(scores, 1)], 2) == Threshold(int(sort_keys(torch.tensor(2.0))), ties=1)


def test_a_large_tensor_over_the_boundary_of_a_chunk():
    size = ranking.CHUNK + 5
    scores = torch.randn(size, generator=torch.Generator().manual_seed(3))
    kept = math.floor(0.1 * size)
    mask = top_k_mask(scores, kept)
    assert mask.sum() == kept
    assert scores[mask].min() >= scores[~mask].max()
