"""Losses between the outputs of two networks: logits, or predictions of a regression."""

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.core.precision import to_float32
from lightning_compress.distillation.losses._divergence import check_positive_temperature, divergence, log_probabilities
from lightning_compress.distillation.losses._shapes import check_labels, check_same


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Divergence of the student's softened class probabilities from the teacher's, `KL(teacher || student)`.

    Args:
        student, teacher: logits, shape `(batch, ..., classes)`.
        temperature: above 0, no unit; 1 leaves the probabilities as they are.

    Returns:
        Scalar in nats, the mean over all rows of classes, times `temperature ** 2` so that gradients keep their size
        at any temperature.

    Raises:
        ValueError: if the shapes differ, or the temperature is not above 0.

    Reference: Hinton et al., 2015, section 2, https://arxiv.org/abs/1503.02531

    >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    >>> round(kl_divergence(student, teacher, temperature=1.0).item(), 4)  # 0.75 ln 1.5 + 0.25 ln 0.5
    0.1308
    """
    check_same(student, teacher)
    return (
        divergence(log_probabilities(teacher, temperature), log_probabilities(student, temperature)).mean()
        * temperature**2
    )


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """As `kl_divergence`, but `KL(student || teacher)`: the student may ignore modes that it cannot represent.

    Reference: Gu et al., 2024, section 2.1, https://arxiv.org/abs/2306.08543

    >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    >>> round(reverse_kl(student, teacher, temperature=1.0).item(), 4)  # 0.5 ln (0.5 / 0.75) + 0.5 ln 2
    0.1438
    """
    check_same(student, teacher)
    return kl_divergence(teacher, student, temperature)


def standardised_kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """As `kl_divergence`, of logits standardised to mean 0 and standard deviation 1 in each row.

    The student learns the relations between logits, but not their scale. The standard deviation is the biased one:
    the sum of squares is divided by the number of classes.

    Reference: Sun et al., 2024, section 4, https://arxiv.org/abs/2403.01427

    >>> logits = torch.tensor([[1.0, 0.0, 5.0]])
    >>> bool(standardised_kl_divergence(logits, 10 * logits + 3) < 1e-6)  # scale and offset do not count
    True
    """
    check_same(student, teacher)
    return kl_divergence(_standardised(student), _standardised(teacher), temperature)


def logit_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the logits, both of the same shape.

    Raises:
        ValueError: if the shapes differ.

    Reference: Ba and Caruana, 2014, section 2.2, https://arxiv.org/abs/1312.6184

    >>> logit_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])).item()  # (1 + 4) / 2
    2.5
    """
    check_same(student, teacher)
    return functional.mse_loss(to_float32(student), to_float32(teacher))


def dkd(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """Decoupled distillation: the divergence of (target, all others), plus the divergence among the other classes.

    With `alpha` 1, and `beta` equal to the teacher's probability of all other classes in each row, it would be
    `kl_divergence`. A constant `beta` keeps the second part where the teacher is sure of the target.

    Args:
        student, teacher: logits, shape `(batch, classes)`.
        target: integer class labels, shape `(batch,)`.
        temperature: above 0, no unit.
        alpha: weight of the divergence of (target, all others).
        beta: weight of the divergence among the others.

    Returns:
        Scalar in nats, the mean over the batch, times `temperature ** 2`.

    Raises:
        ValueError: if the shapes do not fit, or the temperature is not above 0.

    Reference: Zhao et al., 2022, section 3, https://arxiv.org/abs/2203.08679

    >>> student, teacher = torch.zeros(1, 3), torch.tensor([[0.5, 0.25, 0.25]]).log()
    >>> target = torch.tensor([0])  # (1/2, 1/2) against (1/3, 2/3); the other two classes agree
    >>> round(dkd(student, teacher, target, temperature=1.0).item(), 4)  # 0.5 ln 1.125
    0.0589
    """
    check_same(student, teacher)
    check_labels(target, student)
    check_positive_temperature(temperature)
    own_student, rest_student = _own_and_rest(to_float32(student) / temperature, target)
    own_teacher, rest_teacher = _own_and_rest(to_float32(teacher) / temperature, target)
    own, rest = divergence(own_teacher, own_student), divergence(rest_teacher, rest_student)
    return (alpha * own + beta * rest).mean() * temperature**2


def dist(student: Tensor, teacher: Tensor, temperature: float = 4.0, beta: float = 1.0, gamma: float = 1.0) -> Tensor:
    """One minus the correlation of student and teacher: over the classes of a sample, and over the samples of a class.

    Args:
        student, teacher: logits, shape `(batch, ..., classes)`; all but the last dimension are samples.
        temperature: above 0, no unit.
        beta: weight of the relation between the classes of each sample.
        gamma: weight of the relation between the samples of each class; with one sample this part is constant.

    Returns:
        Scalar in `[0, 2 * (beta + gamma)]`, times `temperature ** 2` as in the authors' code.

    Raises:
        ValueError: if the shapes differ, or the temperature is not above 0.

    Reference: Huang et al., 2022, section 3.2, https://arxiv.org/abs/2205.10536

    >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> round(dist(student, -student, temperature=1.0).item(), 4)  # both correlations are -1
    4.0
    """
    check_same(student, teacher)
    rows_student, rows_teacher = (
        log_probabilities(logits, temperature).exp().flatten(0, -2) for logits in (student, teacher)
    )
    between_classes = 1 - _correlation(rows_student, rows_teacher).mean()
    between_samples = 1 - _correlation(rows_student.T, rows_teacher.T).mean()
    return (beta * between_classes + gamma * between_samples) * temperature**2


def binary_kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Divergence of the student's probability of each label from the teacher's, for multi-label classification.

    Args:
        student, teacher: logits, shape `(batch, ..., labels)`.
        temperature: above 0, no unit.

    Returns:
        Scalar in nats, summed over labels, the mean over all rows, times `temperature ** 2`.

    Raises:
        ValueError: if the shapes differ, or the temperature is not above 0.

    Reference: Yang et al., 2023, section 3.2, https://arxiv.org/abs/2308.06453

    >>> student, teacher = torch.tensor([[0.0]]), torch.tensor([[3.0]]).log()  # probabilities 1/2 and 3/4
    >>> round(binary_kl(student, teacher, temperature=1.0).item(), 4)
    0.1308
    """
    check_same(student, teacher)
    check_positive_temperature(temperature)
    log_q, log_p = (_yes_and_no(to_float32(logits) / temperature) for logits in (student, teacher))
    return divergence(log_p, log_q).sum(-1).mean() * temperature**2


def bounded_regression(student: Tensor, teacher: Tensor, target: Tensor, margin: float = 0.0) -> Tensor:
    """Squared error of the student, but 0 in rows where it is smaller than the teacher's error by the margin.

    Args:
        student, teacher: outputs of a regression, shape `(batch, ..., outputs)`.
        target: true values, same shape.
        margin: at least 0, in squares of the target's unit.

    Returns:
        Scalar, summed over outputs, the mean over all rows, rows of error 0 included.

    Raises:
        ValueError: if the shapes differ, or the margin is below 0.

    Reference: Chen et al., 2017, section 3.3,
    https://papers.nips.cc/paper/6676-learning-efficient-object-detection-models-with-knowledge-distillation

    >>> student, teacher = torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [2.0]])
    >>> bounded_regression(student, teacher, target=torch.zeros(2, 1)).item()  # (9 + 0) / 2
    4.5
    """
    check_same(student, teacher)
    if target.shape != student.shape:
        raise ValueError(f"student has shape {tuple(student.shape)} and target {tuple(target.shape)}: they must agree.")
    if margin < 0:
        raise ValueError(f"margin is 0 or more, but is {margin}. The larger it is, the more often the error counts.")
    error, bound = ((to_float32(output) - to_float32(target)).square().sum(-1) for output in (student, teacher))
    return torch.where(error + margin > bound, error, 0.0).mean()


def per_pixel_kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """As `kl_divergence`, at each pixel of a dense prediction, shape `(batch, classes, *space)`; the mean over pixels.

    Reference: Liu et al., 2019, section 3.1, https://arxiv.org/abs/1903.04197

    >>> student = torch.zeros(1, 2, 2)  # 2 classes, 2 pixels
    >>> teacher = torch.tensor([[[0.75, 0.5], [0.25, 0.5]]]).log()  # the second pixel agrees
    >>> round(per_pixel_kl(student, teacher, temperature=1.0).item(), 4)  # 0.1308 / 2
    0.0654
    """
    check_same(student, teacher)
    if student.ndim < 3:
        raise ValueError(
            f"per_pixel_kl takes shape (batch, classes, *space), but got {tuple(student.shape)}. For logits without "
            f"space take kl_divergence."
        )
    return kl_divergence(student.movedim(1, -1), teacher.movedim(1, -1), temperature)


def _standardised(logits: Tensor) -> Tensor:
    # Equal logits, as of a zero-initialised head, have deviation 0, whose gradient is infinite without `eps`.
    return functional.layer_norm(to_float32(logits), logits.shape[-1:], eps=1e-7)


def _own_and_rest(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, all others), shape `(batch, 2)`, and of each class without the target."""
    # The lowest finite number instead of -inf, so that 0 * log(0) is 0.
    rest = logits.scatter(-1, target[:, None], torch.finfo(logits.dtype).min)
    own = torch.cat([logits.gather(-1, target[:, None]), rest.logsumexp(-1, keepdim=True)], dim=-1)
    return functional.log_softmax(own, dim=-1), functional.log_softmax(rest, dim=-1)


def _yes_and_no(logits: Tensor) -> Tensor:
    return torch.stack([functional.logsigmoid(logits), functional.logsigmoid(-logits)], dim=-1)


def _correlation(rows: Tensor, others: Tensor) -> Tensor:
    return functional.cosine_similarity(_centred(rows), _centred(others), dim=-1)


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(-1, keepdim=True)
