"""Losses between token probabilities, from their definitions by scipy."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

from lightning_compress.distillation.losses import language

LOSSES = (language.token_kl_divergence, language.token_reverse_kl, language.generalised_jsd)


def draw():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.tensor([[True, False, True, True], [False, False, True, False]])


def kl(p, q):
    return rel_entr(p, q).sum(-1)


def test_the_mean_is_over_the_tokens_that_count():
    student, teacher, mask = draw()
    p, q = (softmax(one.numpy() / 2.0, axis=-1) for one in (teacher, student))
    counts = [(0, 0), (0, 2), (0, 3), (1, 2)]
    forward = sum(kl(p[place], q[place]) for place in counts)
    assert language.token_kl_divergence(student, teacher, 2.0, mask).item() == pytest.approx(forward)  # 2 ** 2 / 4 is 1
    reverse = sum(kl(q[place], p[place]) for place in counts)
    assert language.token_reverse_kl(student, teacher, 2.0, mask).item() == pytest.approx(reverse)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalised_jsd_from_its_definition(beta):
    student, teacher, _ = draw()
    p, q = (softmax(one.numpy() / 3.0, axis=-1) for one in (teacher, student))
    mixture = beta * p + (1 - beta) * q
    expected = np.mean(beta * kl(p, mixture) + (1 - beta) * kl(q, mixture)) * 9.0
    assert language.generalised_jsd(student, teacher, 3.0, beta=beta).item() == pytest.approx(expected)


def test_generalised_jsd_tends_to_the_two_divergences():
    student, teacher, mask = draw()
    near_0 = language.generalised_jsd(student, teacher, 4.0, mask, beta=1e-5) / 1e-5
    assert near_0.item() == pytest.approx(language.token_kl_divergence(student, teacher, 4.0, mask).item(), rel=1e-3)
    near_1 = language.generalised_jsd(student, teacher, 4.0, mask, beta=1 - 1e-5) / 1e-5
    assert near_1.item() == pytest.approx(language.token_reverse_kl(student, teacher, 4.0, mask).item(), rel=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_stands_in_the_padding_does_not_matter(loss):
    student, teacher, mask = draw()
    expected = loss(student, teacher, mask=mask)
    student[~mask], teacher[~mask] = float("nan"), float("inf")
    student.requires_grad_()
    value = loss(student, teacher, mask=mask)
    value.backward()
    assert torch.equal(value, expected)
    assert not student.grad[~mask].any()
    assert student.grad[mask].isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_in_which_no_token_counts_gives_zero(loss):
    student, teacher, mask = draw()
    student.requires_grad_()
    value = loss(student, teacher, mask=torch.zeros_like(mask))
    value.backward()
    assert value.item() == 0.0
    assert not student.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_what_cannot_be_is_refused(loss):
    student, teacher, mask = draw()
    for wrong in (mask[:, :3], mask.long(), mask[0]):
        with pytest.raises(ValueError, match=r"mask is boolean of shape \(2, 4\)"):
            loss(student, teacher, mask=wrong)
    with pytest.raises(ValueError, match=r"\(batch, length, vocabulary\)"):
        loss(student[0], teacher[0])
    with pytest.raises(ValueError, match="temperature is above 0, but is 0"):
        loss(student, teacher, temperature=0)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, float("nan")])
def test_the_ends_of_generalised_jsd_are_other_losses(beta):
    student, teacher, _ = draw()
    with pytest.raises(ValueError, match=r"beta is in \(0, 1\)"):
        language.generalised_jsd(student, teacher, beta=beta)
