"""Losses between logits, from their definitions by loops, numpy and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, rel_entr, softmax
from scipy.stats import pearsonr
from torch.nn import functional

from lightning_compress.distillation.losses import logits


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def kl(p, q):
    return rel_entr(p, q).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_soft_targets_is_the_mean_divergence_times_the_square_of_the_temperature(temperature):
    student, teacher = draw(6, 5)
    p, q = (softmax(one.numpy() / temperature, axis=-1) for one in (teacher, student))
    expected = kl(p, q).mean() * temperature**2
    assert logits.kl_divergence(student, teacher, temperature).item() == pytest.approx(expected)
    assert logits.reverse_kl(student, teacher, temperature).item() == pytest.approx(kl(q, p).mean() * temperature**2)


def test_soft_targets_by_hand():
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert logits.kl_divergence(student, teacher, temperature=1.0).item() == pytest.approx(expected)


def test_soft_targets_counts_each_row_of_a_sequence_alike():
    student, teacher = draw(2, 3, 5)
    rows = logits.kl_divergence(student.reshape(6, 5), teacher.reshape(6, 5))
    assert logits.kl_divergence(student, teacher).item() == pytest.approx(rows.item())


def test_at_a_high_temperature_the_gradient_is_that_of_squared_centred_logits():
    # Hinton et al., section 2.1: the gradient tends to (centred student - centred teacher) / classes, for one sample.
    student, teacher = draw(1, 5)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(logits.kl_divergence(student, teacher, temperature=1e4), student)
    difference = (student - student.mean() - teacher + teacher.mean()).detach()
    assert torch.allclose(gradient, difference / 5, atol=1e-2)


def test_squared_logits_by_hand():
    loss = logits.logit_mse(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 1.0]]))
    assert loss.item() == pytest.approx((1 + 4 + 0 + 1) / 4)


def test_dkd_from_its_two_divergences():
    student, teacher = draw(6, 5)
    target, temperature, alpha, beta = torch.tensor([0, 4, 2, 2, 1, 3]), 3.0, 0.5, 2.0
    p, q = (softmax(one.numpy() / temperature, axis=-1) for one in (teacher, student))
    total = 0.0
    for row, own in enumerate(target.tolist()):
        binary = kl(np.array([p[row, own], 1 - p[row, own]]), np.array([q[row, own], 1 - q[row, own]]))
        rest_p, rest_q = (np.delete(one[row], own) for one in (p, q))
        total += alpha * binary + beta * kl(rest_p / rest_p.sum(), rest_q / rest_q.sum())
    loss = logits.dkd(student, teacher, target, temperature, alpha, beta)
    assert loss.item() == pytest.approx(total / 6 * temperature**2)


def test_dkd_puts_soft_targets_together_again():
    student, teacher = draw(1, 5)
    target = torch.tensor([3])
    others = 1 - torch.softmax(teacher / 4, dim=-1)[0, 3].item()
    loss = logits.dkd(student, teacher, target, 4.0, alpha=1.0, beta=others)
    assert loss.item() == pytest.approx(logits.kl_divergence(student, teacher, 4.0).item())


def test_dkd_of_a_teacher_beyond_doubt_is_finite():
    teacher = torch.tensor([[200.0, 0.0, 1.0]])
    student = torch.tensor([[0.0, 300.0, 0.0]], requires_grad=True)
    loss = logits.dkd(student, teacher, torch.tensor([0]), temperature=1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_dist_is_one_minus_the_correlations_by_scipy():
    student, teacher = draw(6, 5)
    p, q = (softmax(one.numpy() / 2.0, axis=-1) for one in (teacher, student))
    classes = 1 - np.mean([pearsonr(p[row], q[row]).statistic for row in range(6)])
    samples = 1 - np.mean([pearsonr(p[:, column], q[:, column]).statistic for column in range(5)])
    loss = logits.dist(student, teacher, temperature=2.0, beta=0.5, gamma=3.0)
    assert loss.item() == pytest.approx((0.5 * classes + 3.0 * samples) * 4.0)


def test_standardised_soft_targets_is_free_in_offset_and_size_of_each_row():
    student, teacher = draw(6, 5)
    size, offset = torch.rand(6, 1, generator=torch.Generator().manual_seed(2)) + 0.5, torch.arange(6.0)[:, None]
    loss = logits.standardised_kl_divergence(student, teacher)
    assert logits.standardised_kl_divergence(student * size + offset, teacher).item() == pytest.approx(loss.item())
    z_student, z_teacher = ((one - one.mean(-1, True)) / one.std(-1, False, keepdim=True) for one in (student, teacher))
    assert loss.item() == pytest.approx(logits.kl_divergence(z_student, z_teacher).item(), rel=1e-6)


def test_standardised_soft_targets_of_a_head_that_begins_at_zero_has_a_usable_gradient():
    student = torch.zeros(4, 5, requires_grad=True)
    logits.standardised_kl_divergence(student, torch.randn(4, 5, generator=torch.Generator().manual_seed(0))).backward()
    assert student.grad.abs().max() < 1e5


def test_multi_label_is_a_divergence_of_coins():
    student, teacher = draw(6, 5)
    p, q = (expit(one.numpy() / 2.0) for one in (teacher, student))
    expected = (rel_entr(p, q) + rel_entr(1 - p, 1 - q)).sum(-1).mean() * 4.0
    assert logits.binary_kl(student, teacher, temperature=2.0).item() == pytest.approx(expected)


def test_bounded_regression_forgives_whoever_beats_the_teacher_by_the_margin():
    target = torch.zeros(3, 2)
    teacher = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])  # errors 2, 2, 2
    student = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.5, 0.5]])  # errors 4, 1, 0.5
    assert logits.bounded_regression(student, teacher, target).item() == pytest.approx(4.0 / 3)
    assert logits.bounded_regression(student, teacher, target, margin=1.2).item() == pytest.approx((4.0 + 1.0) / 3)
    assert logits.bounded_regression(student, teacher, target, margin=5.0).item() == pytest.approx(5.5 / 3)


def test_per_pixel_is_the_mean_over_places():
    student, teacher = draw(2, 5, 3, 4)
    places = [
        logits.kl_divergence(student[:, :, row, column], teacher[:, :, row, column], 2.0)
        for row in range(3)
        for column in range(4)
    ]
    assert logits.per_pixel_kl(student, teacher, 2.0).item() == pytest.approx(torch.stack(places).mean().item())


def test_soft_targets_of_half_precision_is_that_of_float32():
    student, teacher = (one.half() for one in draw(6, 50))
    expected = logits.kl_divergence(student.double(), teacher.double()).item()
    assert logits.kl_divergence(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_soft_targets_is_kl_div_of_torch():
    student, teacher = draw(6, 5)
    expected = functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert logits.kl_divergence(student, teacher, 1.0).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("loss", [logits.kl_divergence, logits.dist, logits.binary_kl, logits.per_pixel_kl])
def test_a_temperature_that_softens_nothing_is_refused(loss, temperature):
    with pytest.raises(ValueError, match="temperature is above 0, but is"):
        loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), temperature=temperature)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="margin is 0 or more, but is -1"):
        logits.bounded_regression(*[torch.zeros(2, 3)] * 3, margin=-1)
    with pytest.raises(ValueError, match=r"student has shape \(2, 3\) and target \(2,\)"):
        logits.bounded_regression(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2))
    for target in (torch.zeros(3, dtype=torch.long), torch.zeros(2), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(ValueError, match="integer class labels"):
            logits.dkd(torch.zeros(2, 3), torch.zeros(2, 3), target)
    with pytest.raises(ValueError, match=r"\(batch, classes, \*space\)"):
        logits.per_pixel_kl(torch.zeros(2, 3), torch.zeros(2, 3))
