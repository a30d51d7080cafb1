"""Losses between features, from their definitions by loops over samples and channels."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from lightning_compress.distillation.losses import features


def draw(student, teacher, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (student, teacher))


def smooth_l1(difference):
    return 0.5 * difference**2 if abs(difference) < 1 else abs(difference) - 0.5


def test_hint_by_hand():
    assert features.hint(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]])).item() == 2.0


def test_attention_transfer_by_hand():
    # Squares summed over channels: (9 + 16, 0) and (0, 4), as vectors of length 1: (1, 0) and (0, 1).
    student = torch.tensor([[[3.0, 0.0], [4.0, 0.0]]])
    teacher = torch.tensor([[[0.0, 2.0]]])
    assert features.attention_transfer(student, teacher).item() == pytest.approx((1 + 1) / 2)


def test_attention_transfer_averages_the_larger_map():
    student, teacher = draw((2, 3, 4, 4), (2, 5, 2, 2))
    total = 0.0
    for sample in range(2):
        small = [
            [student[sample, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].square().sum() / 4 for j in (0, 1)]
            for i in (0, 1)
        ]
        ours, theirs = torch.tensor(small), teacher[sample].square().sum(0)
        total += (ours / ours.norm() - theirs / theirs.norm()).square().sum().item()
    assert features.attention_transfer(student, teacher).item() == pytest.approx(total / 8)


def test_similarity_preserving_by_loops():
    student, teacher = draw((4, 3, 2, 2), (4, 7))
    tables = []
    for rows in (student.flatten(1), teacher):
        table = torch.tensor([[(one * other).sum() for other in rows] for one in rows], dtype=torch.float64)
        tables.append(torch.stack([row / row.norm() for row in table]))
    expected = ((tables[0] - tables[1]) ** 2).sum() / 4**2
    assert features.similarity_preserving(student, teacher).item() == pytest.approx(expected.item())


def test_rkd_distance_by_loops():
    student, teacher = draw((5, 3, 2, 2), (5, 7))
    relative = []
    for rows in (student.flatten(1), teacher):
        distances = [math.dist(one, other) for one, other in itertools.combinations(rows.tolist(), 2)]
        relative.append([distance / (sum(distances) / 10) for distance in distances])
    expected = sum(smooth_l1(one - other) for one, other in zip(*relative, strict=True)) / 10
    assert features.rkd_distance(student, teacher).item() == pytest.approx(expected)


def test_rkd_distance_of_two_samples_says_nothing_and_knows_no_size():
    student, teacher = draw((5, 3), (5, 3))
    loss = features.rkd_distance(student, teacher).item()
    assert features.rkd_distance(7 * student, 0.1 * teacher).item() == pytest.approx(loss)
    assert features.rkd_distance(student[:2], teacher[:2]).item() == pytest.approx(0.0)


@pytest.mark.parametrize("coincide", [False, True])
def test_rkd_angle_by_loops(coincide):
    student, teacher = draw((5, 3, 2, 2), (5, 7))
    if coincide:
        student[1] = student[0]
    total = 0.0
    for vertex, one, other in itertools.permutations(range(5), 3):
        cosines = [
            functional.cosine_similarity(rows[one] - rows[vertex], rows[other] - rows[vertex], dim=0).item()
            for rows in (student.flatten(1), teacher)
        ]
        total += smooth_l1(cosines[0] - cosines[1])
    assert features.rkd_angle(student, teacher).item() == pytest.approx(total / (5 * 4 * 3))


@pytest.mark.parametrize("loss", [features.rkd_distance, features.rkd_angle, features.pkt])
def test_samples_that_coincide_give_a_finite_gradient(loss):
    student, teacher = draw((5, 3), (5, 3))
    student[1] = student[0]
    student.requires_grad_()
    loss(student, teacher).backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() < 1e3


@pytest.mark.parametrize("loss", [features.rkd_distance, features.rkd_angle, features.pkt])
def test_a_batch_without_pairs_gives_zero(loss):
    student, teacher = draw((1, 3), (1, 3))
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.item() == 0.0
    assert not student.grad.any()


def test_pkt_by_loops():
    student, teacher = draw((4, 3), (4, 7))
    neighbours = []
    for rows in (student, teacher):
        table = [
            [
                0.0 if i == j else (functional.cosine_similarity(rows[i], rows[j], dim=0).item() + 1) / 2
                for j in range(4)
            ]
            for i in range(4)
        ]
        neighbours.append([[value / sum(row) for value in row] for row in table])
    q, p = neighbours
    expected = sum(p[i][j] * math.log(p[i][j] / q[i][j]) for i in range(4) for j in range(4) if i != j) / 4
    assert features.pkt(student, teacher).item() == pytest.approx(expected)


def test_fsp_by_loops():
    student, teacher = [draw((2, 3, 4), (2, 5, 4), seed) for seed in (0, 1)]
    total = 0.0
    for sample, i, j in itertools.product(range(2), range(3), range(5)):
        flows = [
            sum(first[sample, i, p] * second[sample, j, p] for p in range(4)) / 4
            for first, second in (student, teacher)
        ]
        total += (flows[0] - flows[1]).item() ** 2
    assert features.fsp(list(student), list(teacher)).item() == pytest.approx(total / (2 * 3 * 5))


def test_fsp_averages_the_larger_layer_of_each_network():
    student, teacher = [draw((2, 3, 4, 4), (2, 5, 2, 2), seed) for seed in (0, 1)]
    small = [(functional.avg_pool2d(first, 2), second) for first, second in (student, teacher)]
    assert features.fsp(student, teacher).item() == pytest.approx(features.fsp(*small).item())


@pytest.mark.parametrize("space", [(2, 2), (5, 5)], ids=["fewer_places_than_channels", "more_places_than_channels"])
def test_nst_by_loops(space):
    student, teacher = draw((2, 6, *space), (2, 7, *space))
    ours, theirs = (
        [[channel / channel.norm() for channel in sample.flatten(1)] for sample in one] for one in (student, teacher)
    )

    def mean(ones, others):
        return sum((one @ other).item() ** 2 for one in ones for other in others) / (len(ones) * len(others))

    expected = sum(
        mean(one, one) + mean(other, other) - 2 * mean(one, other) for one, other in zip(ours, theirs, strict=True)
    )
    assert features.nst(student, teacher).item() == pytest.approx(expected / 2)


def test_nst_does_not_ask_for_the_order_of_channels_and_averages_the_larger_map():
    student, teacher = draw((2, 6, 4, 4), (2, 7, 2, 2))
    loss = features.nst(student, teacher).item()
    assert features.nst(student.flip(1), teacher).item() == pytest.approx(loss)
    assert features.nst(functional.avg_pool2d(student, 2), teacher).item() == pytest.approx(loss)
    assert features.nst(student, student[:, [3, 1, 0, 2, 5, 4]]).item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("loss", [features.similarity_preserving, features.pkt, features.nst, features.rkd_angle])
def test_autocast_does_not_coarsen_inner_products(loss):
    student, teacher = (one.float() for one in draw((4, 3, 2, 2), (4, 5, 2, 2)))
    expected = loss(student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(student, teacher), expected)


def test_layers_and_maps_that_do_not_fit_are_refused():
    maps = torch.zeros(2, 3, 4, 4)
    with pytest.raises(ValueError, match="student has 1 layers and teacher 2"):
        features.fsp([maps], [maps, maps])
    with pytest.raises(ValueError, match=r"student has shape \(2, 3, 3\) and teacher \(2, 3, 5\)"):
        features.fsp([maps, maps], [maps, torch.zeros(2, 5, 4, 4)])
    for loss in (features.attention_transfer, features.nst):
        with pytest.raises(ValueError, match="same of"):
            loss(maps, torch.zeros(2, 3, 16))
        with pytest.raises(ValueError, match="same of"):
            loss(torch.zeros(2, 3), torch.zeros(2, 3))
