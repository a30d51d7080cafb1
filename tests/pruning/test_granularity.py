"""Which weights live and die together: by hand, by what a layer puts out, and by brute force for N:M."""

from itertools import product

import pytest
import torch
from torch import nn

from lightning_compress.pruning.functional.topk import top_k_mask
from lightning_compress.pruning.granularity import (
    Block,
    NOfM,
    PerWeight,
    Slices,
    outputs_to_front,
    outputs_to_stored,
    parse_granularity,
)

GRANULARITIES = ("weight", "2:4", "block 2x2", "block 1x4", "kernel", "row", "column", "filter", "group")
SHAPES = ((4, 8), (4, 8, 3), (4, 8, 3, 2), (2, 4, 1, 2, 3))

# Linear: 1 2 3 4 / 5 6 7 8. Convolution: filter 0 is (0 1), (2 3), filter 1 is (4 5), (6 7).
LINEAR = torch.arange(1.0, 9.0).view(2, 4)
CONVOLUTION = torch.arange(8.0).view(2, 2, 1, 2)


@pytest.mark.parametrize(
    ("granularity", "scores", "expected", "size"),
    [
        ("weight", LINEAR, [1, 2, 3, 4, 5, 6, 7, 8], 1),
        ("row", LINEAR, [2.5, 6.5], 4),
        ("filter", LINEAR, [2.5, 6.5], 4),
        ("column", LINEAR, [3, 4, 5, 6], 2),
        ("kernel", LINEAR, [1, 2, 3, 4, 5, 6, 7, 8], 1),
        ("group", LINEAR, [3, 4, 5, 6], 2),
        ("block 2x2", LINEAR, [3.5, 5.5], 4),
        ("block 1x2", LINEAR, [1.5, 3.5, 5.5, 7.5], 2),
        ("block 2x1", LINEAR, [3, 4, 5, 6], 2),
        ("2:4", LINEAR, [1, 2, torch.inf, torch.inf, 5, 6, torch.inf, torch.inf], 1),
        ("1:2", LINEAR, [1, torch.inf, 3, torch.inf, 5, torch.inf, 7, torch.inf], 1),
        ("kernel", CONVOLUTION, [0.5, 2.5, 4.5, 6.5], 2),
        ("row", CONVOLUTION, [1.5, 5.5], 4),
        ("filter", CONVOLUTION, [1.5, 5.5], 4),
        ("column", CONVOLUTION, [2.5, 4.5], 4),
        ("group", CONVOLUTION, [2, 3, 4, 5], 2),
        ("block 2x2", CONVOLUTION, [2.5, 4.5], 4),
        ("block 1x4", CONVOLUTION, [1.5, 5.5], 4),
        # The inputs of one place of the kernel are 0 2, 1 3, 4 6, 5 7: the second of each stays.
        ("1:2", CONVOLUTION, [0, 1, torch.inf, torch.inf, 4, 5, torch.inf, torch.inf], 1),
    ],
)
def test_the_scores_of_units_by_hand(granularity, scores, expected, size):
    grain = parse_granularity(granularity)
    assert grain.units(scores).tolist() == expected
    assert grain.size(scores.shape) == size


@pytest.mark.parametrize(
    ("granularity", "shape", "units", "expected"),
    [
        ("row", (2, 3), [0, 1], [[0, 0, 0], [1, 1, 1]]),
        ("column", (2, 3), [0, 1, 0], [[0, 1, 0], [0, 1, 0]]),
        ("group", (2, 3), [1, 0, 1], [[1, 0, 1], [1, 0, 1]]),
        ("block 2x2", (2, 4), [0, 1], [[0, 0, 1, 1], [0, 0, 1, 1]]),
        ("block 1x2", (2, 4), [0, 1, 1, 0], [[0, 0, 1, 1], [1, 1, 0, 0]]),
        ("kernel", (2, 2, 1, 2), [1, 0, 0, 1], [[[[1, 1]], [[0, 0]]], [[[0, 0]], [[1, 1]]]]),
        ("filter", (2, 2, 1, 2), [0, 1], [[[[0, 0]], [[0, 0]]], [[[1, 1]], [[1, 1]]]]),
        ("column", (2, 2, 1, 2), [0, 1], [[[[0, 0]], [[1, 1]]], [[[0, 0]], [[1, 1]]]]),
        ("group", (2, 2, 1, 2), [0, 1, 1, 0], [[[[0, 1]], [[1, 0]]], [[[0, 1]], [[1, 0]]]]),
        ("block 2x2", (2, 2, 1, 2), [0, 1], [[[[0, 0]], [[1, 1]]], [[[0, 0]], [[1, 1]]]]),
    ],
)
def test_the_masks_of_weights_by_hand(granularity, shape, units, expected):
    mask = parse_granularity(granularity).mask(torch.tensor(units, dtype=torch.bool), torch.Size(shape))
    assert mask.int().tolist() == expected


@pytest.mark.parametrize("granularity", [one for one in GRANULARITIES if ":" not in one])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_units_divide_the_weight_and_a_mask_of_them_comes_back(granularity, shape):
    grain, shape = parse_granularity(granularity), torch.Size(shape)
    assert grain.misfit(shape) is None
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(shape.numel() // grain.size(shape), generator=generator) < 0.5
    mask = grain.mask(chosen, shape)
    assert mask.shape == shape
    assert mask.sum() == chosen.sum() * grain.size(shape)
    assert torch.equal(grain.units(mask.float()), chosen.float())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("shape", [(6, 16), (3, 8, 3), (4, 8, 3, 2)], ids=str)
def test_n_of_m_keeps_the_best_n_of_each_m_inputs_and_exactly_these(n, m, shape):
    scores = (torch.randn(shape, generator=torch.Generator().manual_seed(n * m)) * 2).round()  # with ties
    grain = parse_granularity(f"{n}:{m}")
    kept = scores.numel() * n // m
    mask = grain.mask(top_k_mask(grain.units(scores), kept), scores.shape)
    places = product(range(shape[0]), *(range(length) for length in shape[2:]))
    for place in places:
        line = (place[0], slice(None), *place[1:])
        row, mask_row = scores[line], mask[line]
        for start in range(0, shape[1], m):
            group = row[start : start + m].tolist()
            best = sorted(range(m), key=lambda index: (-group[index], index))[:n]
            assert mask_row[start : start + m].nonzero().flatten().tolist() == sorted(best)


def test_on_the_way_to_n_of_m_nothing_is_pruned_that_the_pattern_keeps():
    grain, alive = parse_granularity("2:4"), torch.ones(8, 16, dtype=torch.bool)
    scores = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    for kept in (120, 100, 80, 65, 64):
        units = grain.units(torch.where(alive, scores, -torch.inf))
        mask = grain.mask(top_k_mask(units, kept), scores.shape)
        assert mask.sum() == kept
        assert not (mask & ~alive).any()
        assert (mask.view(8, 4, 4).sum(-1) >= 2).all()
        alive = mask
    assert (alive.view(8, 4, 4).sum(-1) == 2).all()


CONVOLUTIONS = {
    "linear": (nn.Linear(4, 6, bias=False), (4,)),
    "conv1d": (nn.Conv1d(4, 6, 3, bias=False), (4, 5)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), bias=False), (4, 5, 5)),
    "conv2d-groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
    "conv2d-depthwise": (nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 5, 5)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, bias=False), (4, 5)),
    "transposed2d": (nn.ConvTranspose2d(4, 6, (3, 2), bias=False), (4, 5, 5)),
    "transposed2d-groups": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (4, 5, 5)),
    "transposed2d-depthwise": (nn.ConvTranspose2d(4, 8, 2, groups=4, bias=False), (4, 5, 5)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 2, bias=False), (4, 3, 3, 3)),
}
every_layer = pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def output_without(layer, shape, granularity, unit):
    """What a layer puts out for a random input, before and after one unit of its weight is zeroed."""
    inputs, weight = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)), layer.weight.detach()
    grain, seen = parse_granularity(granularity), outputs_to_front(weight, layer)
    units = torch.ones(seen.numel() // grain.size(seen.shape), dtype=torch.bool)
    units[unit] = False
    mask = outputs_to_stored(grain.mask(units, seen.shape), layer)
    assert mask.shape == weight.shape
    return inputs, layer(inputs).detach(), torch.func.functional_call(layer, {"weight": weight * mask}, inputs).detach()


@every_layer
@pytest.mark.parametrize("granularity", ["row", "filter"])
def test_a_pruned_filter_silences_its_output_and_no_other(layer, shape, granularity):
    outputs = layer.weight.shape[0] if "Transpose" not in type(layer).__name__ else layer.out_channels
    for unit in range(outputs):
        _, dense, pruned = output_without(layer, shape, granularity, unit)
        assert (pruned[:, unit] == 0).all()
        others = [index for index in range(outputs) if index != unit]
        assert torch.equal(pruned[:, others], dense[:, others])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [pair for name, pair in CONVOLUTIONS.items() if not name.endswith(("groups", "depthwise"))],
    ids=[name for name in CONVOLUTIONS if not name.endswith(("groups", "depthwise"))],
)
def test_a_pruned_column_makes_a_layer_blind_to_its_input(layer, shape):
    for unit in range(4):
        inputs, _, pruned = output_without(layer, shape, "column", unit)
        blind = inputs.clone()
        blind[:, unit] = 0.0
        assert torch.allclose(layer(blind), pruned, atol=1e-6)


@every_layer
def test_outputs_first_and_as_stored_are_the_way_there_and_back(layer, shape):
    weight = layer.weight.detach()
    seen = outputs_to_front(weight, layer)
    groups = getattr(layer, "groups", 1)
    outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    assert seen.shape == (outputs, 4 // groups, *weight.shape[2:])
    assert torch.equal(outputs_to_stored(seen, layer), weight)


def test_a_transposed_convolution_with_groups_by_hand():
    layer = nn.ConvTranspose1d(4, 4, 1, groups=2)
    stored = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]]).view(4, 2, 1)  # rows are inputs, two of each group
    assert outputs_to_front(stored, layer).flatten(1).tolist() == [[1, 3], [2, 4], [5, 7], [6, 8]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weight", PerWeight()),
        (" weight ", PerWeight()),
        ("2:4", NOfM(2, 4)),
        ("1:16", NOfM(1, 16)),
        ("block 4x8", Block(4, 8)),
        ("block 4 x 8", Block(4, 8)),
        ("row", Slices((0,))),
        ("filter", Slices((0,))),
        ("column", Slices((1,))),
        ("kernel", Slices((0, 1))),
        ("group", Slices((-1,))),
    ],
)
def test_a_granularity_is_read(text, expected):
    assert parse_granularity(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights", "No granularity 'weights'. Choose one of .*'weight'.*'group'"),
        ("", "No granularity ''"),
        ("2/4", "No granularity '2/4'"),
        ("block4x4", "No granularity 'block4x4'.*'block 4x4'"),
        ("block 4", "No granularity"),
        ("block -4x4", "No granularity"),
        ("block 0x4", "no weights in a block.*'block 4x4'"),
        ("4:4", "keeps 4 of 4 weights; write N:M with 0 < N < M"),
        ("4:2", "keeps 4 of 2 weights"),
        ("0:4", "keeps 0 of 4 weights"),
        (None, "No granularity 'None'"),
        (4, "No granularity '4'"),
    ],
)
def test_what_is_no_granularity_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_granularity(text)


@pytest.mark.parametrize(
    ("granularity", "shape", "reason"),
    [
        ("2:4", (4, 6), "6 inputs do not divide into groups of 4"),
        ("2:4", (4, 3, 2, 2), "3 inputs do not divide"),
        ("block 3x2", (4, 6), "a matrix of 4 x 6 does not divide into blocks of 3 x 2"),
        ("block 2x4", (4, 3, 3, 3), "a matrix of 4 x 27 does not divide into blocks of 2 x 4"),
        ("block 2x9", (4, 3, 3, 3), None),
        ("row", (5, 7), None),
    ],
)
def test_a_weight_that_does_not_divide_is_a_misfit(granularity, shape, reason):
    found = parse_granularity(granularity).misfit(torch.Size(shape))
    assert found is None if reason is None else reason in found
