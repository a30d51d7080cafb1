"""Losses between the next-token probabilities of two language models; `mask` says which tokens count."""

import math

import torch
from torch import Tensor

from lightning_compress.distillation.losses._divergence import divergence, log_probabilities
from lightning_compress.distillation.losses._shapes import check_same


def token_kl_divergence(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, mask: Tensor | None = None
) -> Tensor:
    """Divergence of the student's softened token probabilities from the teacher's, `KL(teacher || student)`.

    Args:
        student, teacher: logits, shape `(batch, length, vocabulary)`.
        temperature: above 0, no unit; 1 leaves the probabilities as they are.
        mask: boolean, shape `(batch, length)`, True where a token counts; without it, all count.

    Returns:
        Scalar in nats, the mean over the tokens that count (0 if none does), times `temperature ** 2`.

    Raises:
        ValueError: if the shapes do not fit, the mask is not boolean, or the temperature is not above 0.

    Reference: Hinton et al., 2015, section 2, https://arxiv.org/abs/1503.02531

    >>> student, teacher = torch.zeros(1, 2, 2), torch.tensor([[[0.75, 0.25], [0.01, 0.99]]]).log()
    >>> mask = torch.tensor([[True, False]])  # the second token is padding
    >>> round(token_kl_divergence(student, teacher, 1.0, mask).item(), 4)  # 0.75 ln 1.5 + 0.25 ln 0.5
    0.1308
    """
    log_q, log_p = _counted(student, teacher, temperature, mask)
    return _mean(divergence(log_p, log_q)) * temperature**2


def token_reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 4.0, mask: Tensor | None = None) -> Tensor:
    """As `token_kl_divergence`, but `KL(student || teacher)`: the student may ignore modes it cannot represent.

    Reference: Gu et al., 2024, section 2.1, https://arxiv.org/abs/2306.08543

    >>> student, teacher = torch.zeros(1, 1, 2), torch.tensor([[[0.75, 0.25]]]).log()
    >>> round(token_reverse_kl(student, teacher, 1.0).item(), 4)  # 0.5 ln (0.5 / 0.75) + 0.5 ln 2
    0.1438
    """
    log_q, log_p = _counted(student, teacher, temperature, mask)
    return _mean(divergence(log_q, log_p)) * temperature**2


def generalised_jsd(
    student: Tensor, teacher: Tensor, temperature: float = 4.0, mask: Tensor | None = None, beta: float = 0.5
) -> Tensor:
    """Jensen-Shannon divergence of both from their mixture, `beta * teacher + (1 - beta) * student`.

    Near `beta` 0 it is `beta` times `token_kl_divergence`, near 1 it is `1 - beta` times `token_reverse_kl`.

    Args:
        student, teacher, temperature, mask: as in `token_kl_divergence`; the paper compares at temperature 1.
        beta: in (0, 1), the teacher's share of the mixture, and the weight of its divergence.

    Returns:
        Scalar in nats, the mean over the tokens that count (0 if none does), times `temperature ** 2`.

    Raises:
        ValueError: as in `token_kl_divergence`, and if `beta` is not in (0, 1).

    Reference: Agarwal et al., 2024, section 2, https://arxiv.org/abs/2306.13649

    >>> student, teacher = torch.tensor([[[90.0, 0.0]]]), torch.tensor([[[0.0, 90.0]]])  # sure of different tokens
    >>> round(generalised_jsd(student, teacher, temperature=1.0).item(), 4)  # ln 2
    0.6931
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta is in (0, 1), but is {beta}. For 0 take token_kl_divergence, for 1 token_reverse_kl.")
    log_q, log_p = _counted(student, teacher, temperature, mask)
    mixture = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return _mean(beta * divergence(log_p, mixture) + (1 - beta) * divergence(log_q, mixture)) * temperature**2


def _counted(student: Tensor, teacher: Tensor, temperature: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher at the tokens that count, shape `(tokens, vocabulary)`."""
    check_same(student, teacher)
    if student.ndim != 3:
        raise ValueError(f"Logits of tokens have shape (batch, length, vocabulary), but got {tuple(student.shape)}.")
    if mask is not None:
        _check_mask(mask, student)
        # Padding takes no memory, and NaN in padding cannot spoil the sum.
        student, teacher = student[mask], teacher[mask]
    return log_probabilities(student, temperature), log_probabilities(teacher, temperature)


def _check_mask(mask: Tensor, student: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != student.shape[:2]:
        raise ValueError(
            f"mask is boolean of shape {tuple(student.shape[:2])}, True where a token counts, but is {mask.dtype} of "
            f"shape {tuple(mask.shape)}."
        )


def _mean(per_token: Tensor) -> Tensor:
    return per_token.sum() / max(per_token.numel(), 1)
