"""Losses between the features of a layer of two networks; none has parameters of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lightning_compress.core.precision import to_float32
from lightning_compress.distillation.losses._divergence import divergence
from lightning_compress.distillation.losses._precision import inner_products
from lightning_compress.distillation.losses._shapes import check_batch, check_layers, check_same, pool_to_same_size

MAPS = (3, 4, 5)  # dimensions of (batch, channels, *space)


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of features of the same shape; for different shapes see `ProjectedHint`.

    Raises:
        ValueError: if the shapes differ.

    Reference: Romero et al., 2015, section 2.2, https://arxiv.org/abs/1412.6550

    >>> hint(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])).item()  # (1 + 4) / 2
    2.5
    """
    check_same(student, teacher)
    return functional.mse_loss(to_float32(student), to_float32(teacher))


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of attention maps: squared features summed over channels, normalised to length 1.

    Args:
        student, teacher: features, shape `(batch, channels, *space)`; channels may differ, and so may space: the larger
            map is averaged down to the smaller.

    Returns:
        Scalar, the mean over batch and pixels; the authors weigh it by 1000.

    Raises:
        ValueError: if the batches or the numbers of dimensions differ.

    Reference: Zagoruyko and Komodakis, 2017, section 3.1, https://arxiv.org/abs/1612.03928

    >>> student = torch.tensor([[[5.0, 0.0]]])  # 1 channel, active at the first of 2 pixels
    >>> teacher = torch.tensor([[[0.0, 2.0], [0.0, 1.0]]])  # 2 channels, active at the second
    >>> attention_transfer(student, teacher).item()  # (1, 0) against (0, 1)
    1.0
    """
    check_batch(student.shape, teacher.shape, MAPS)
    maps = pool_to_same_size(*(to_float32(features).square().sum(1, keepdim=True) for features in (student, teacher)))
    looks_student, looks_teacher = (functional.normalize(one.flatten(1)) for one in maps)
    return functional.mse_loss(looks_student, looks_teacher)


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the similarities between samples: inner products, each row normalised to length 1.

    Args:
        student, teacher: features, shape `(batch, ...)`; only the batch must agree.

    Returns:
        Scalar, the mean over pairs of samples; the authors weigh it by 3000.

    Raises:
        ValueError: if the batches differ.

    Reference: Tung and Mori, 2019, section 3, https://arxiv.org/abs/1907.09682

    >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # two orthogonal samples: rows (1, 0) and (0, 1)
    >>> teacher = torch.tensor([[1.0], [1.0]])  # two equal samples: rows (1, 1) / sqrt(2)
    >>> round(similarity_preserving(student, teacher).item(), 4)  # 1 - 1 / sqrt(2)
    0.2929
    """
    check_batch(student.shape, teacher.shape)
    alike_student, alike_teacher = (
        functional.normalize(inner_products(rows, rows)) for rows in _samples(student, teacher)
    )
    return functional.mse_loss(alike_student, alike_teacher)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 difference of the distances between samples, each divided by the mean distance in the batch.

    Args:
        student, teacher: features, shape `(batch, ...)`; only the batch must agree.

    Returns:
        Scalar, the mean over pairs of two samples; 0 for a batch of one.

    Raises:
        ValueError: if the batches differ.

    Reference: Park et al., 2019, section 3.2.1, https://arxiv.org/abs/1904.05068

    >>> student = torch.tensor([[0.0], [1.0], [3.0]])  # distances (1, 3, 2) / 2
    >>> teacher = torch.tensor([[0.0], [1.0], [2.0]])  # distances (1, 2, 1) / (4 / 3)
    >>> round(rkd_distance(student, teacher).item(), 4)  # 0.5 * (0.25 ** 2 + 0 + 0.25 ** 2) / 3
    0.0208
    """
    check_batch(student.shape, teacher.shape)
    far_student, far_teacher = (_relative_distances(rows) for rows in _samples(student, teacher))
    return functional.smooth_l1_loss(far_student, far_teacher, reduction="sum") / max(far_student.numel(), 1)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 difference of the cosines of the angles in each triangle of three samples.

    Args:
        student, teacher: features, shape `(batch, ...)`; only the batch must agree. Memory grows with `batch ** 3`.

    Returns:
        Scalar, the mean over triples of three samples; 0 for a batch of two or less.

    Raises:
        ValueError: if the batches differ.

    Reference: Park et al., 2019, section 3.2.2, https://arxiv.org/abs/1904.05068

    >>> student = torch.tensor([[0.0], [1.0], [2.0]])  # on a line: cosines 1, -1, 1
    >>> teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]])  # equilateral: all cosines 1/2
    >>> round(rkd_angle(student, teacher).item(), 4)  # (0.125 + 1 + 0.125) / 3
    0.4167
    """
    check_batch(student.shape, teacher.shape)
    batch = len(student)
    angle_student, angle_teacher = (_angles(rows) for rows in _samples(student, teacher))
    # A direction has no angle with itself: leave the diagonal out. The direction from a sample to itself is the zero
    # vector, so its cosines are 0 for both networks and add nothing.
    others = ~torch.eye(batch, dtype=torch.bool, device=student.device)
    difference = functional.smooth_l1_loss(angle_student, angle_teacher, reduction="none") * others
    return difference.sum() / max(batch * (batch - 1) * (batch - 2), 1)


def pkt(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of each sample's neighbour probabilities, `KL(teacher || student)`, from cosine similarities.

    Args:
        student, teacher: features, shape `(batch, ...)`; only the batch must agree.

    Returns:
        Scalar in nats, the mean over samples of the sum over their neighbours. The authors' code divides by the batch
        size once more: divide their weight by the batch size, too.

    Raises:
        ValueError: if the batches differ.

    Reference: Passalis and Tefas, 2018, section 3, https://arxiv.org/abs/1803.10837

    >>> student = torch.tensor([[1.0], [1.0], [1.0]])  # each sample has two equally close neighbours
    >>> teacher = torch.tensor([[1.0], [1.0], [-1.0]])  # the first two have only each other
    >>> round(pkt(student, teacher).item(), 4)  # (ln 2 + ln 2 + 0) / 3
    0.4621
    """
    check_batch(student.shape, teacher.shape)
    log_q, log_p = (_neighbours(rows) for rows in _samples(student, teacher))
    return divergence(log_p, log_q).mean()


def fsp(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the flow between two layers: inner products of their channels over space.

    Args:
        student, teacher: features of two layers each, shape `(batch, channels, *space)`. The channels of a layer must
            agree. The two layers of a network may differ in space: the larger is averaged down to the smaller.

    Returns:
        Scalar, the mean over batch and pairs of channels; the paper sums over pairs.

    Raises:
        ValueError: if there are not two layers of each, or their batches or channels differ.

    Reference: Yim et al., 2017, section 3,
    https://openaccess.thecvf.com/content_cvpr_2017/papers/Yim_A_Gift_From_CVPR_2017_paper.pdf

    >>> student = [torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0, 4.0]]])]  # flow (1 * 3 + 2 * 4) / 2 = 5.5
    >>> teacher = [torch.ones(1, 1, 2), torch.ones(1, 1, 2)]  # flow 1
    >>> fsp(student, teacher).item()  # 4.5 ** 2
    20.25
    """
    check_layers(student, teacher, number=2)
    for layer_student, layer_teacher in zip(student, teacher, strict=True):
        check_batch(layer_student.shape, layer_teacher.shape)
    flow_student, flow_teacher = _flow(*student), _flow(*teacher)
    check_same(flow_student, flow_teacher)
    return functional.mse_loss(flow_student, flow_teacher)


def nst(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between the channels of both networks, with the kernel `(x . y) ** 2`.

    One draw is a channel's activations over space, normalised to length 1.

    Args:
        student, teacher: features, shape `(batch, channels, *space)`; channels may differ, and so may space: the larger
            map is averaged down to the smaller.

    Returns:
        Scalar, the mean over the batch; at least 0.

    Raises:
        ValueError: if the batches or the numbers of dimensions differ.

    Reference: Huang and Wang, 2017, section 4, https://arxiv.org/abs/1707.01219

    >>> student, teacher = torch.tensor([[[5.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])  # draws (1, 0) and (0, 1)
    >>> nst(student, teacher).item()  # 1 + 1 - 2 * 0
    2.0
    """
    check_batch(student.shape, teacher.shape, MAPS)
    maps = pool_to_same_size(to_float32(student), to_float32(teacher))
    ours, theirs = (functional.normalize(one.flatten(2), dim=-1) for one in maps)
    return (_kernel_mean(ours, ours) + _kernel_mean(theirs, theirs) - 2 * _kernel_mean(ours, theirs)).mean()


def _samples(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return to_float32(student).flatten(1), to_float32(teacher).flatten(1)


def _relative_distances(rows: Tensor) -> Tensor:
    distances = functional.pdist(rows)
    return distances / (distances.sum() / max(distances.numel(), 1)).clamp(min=1e-12)


def _angles(rows: Tensor) -> Tensor:
    """Cosines at each sample (first dimension) between the directions to two other samples."""
    towards = rows[None] - rows[:, None]
    length = torch.linalg.vector_norm(towards, dim=-1, keepdim=True)
    directions = towards / torch.where(length > 0, length, 1.0)
    return inner_products(directions, directions)


def _neighbours(rows: Tensor) -> Tensor:
    """Log-probabilities that two samples are neighbours, shape `(batch, batch)`; no sample is its own neighbour."""
    directions = functional.normalize(rows)
    closeness = ((inner_products(directions, directions) + 1) / 2).clamp(min=1e-7).log()
    oneself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    # The lowest finite number instead of -inf, so that 0 * log(0) is 0.
    return functional.log_softmax(closeness.masked_fill(oneself, torch.finfo(closeness.dtype).min), dim=-1)


def _flow(first: Tensor, second: Tensor) -> Tensor:
    check_batch(first.shape, second.shape, MAPS)
    first, second = (layer.flatten(2) for layer in pool_to_same_size(to_float32(first), to_float32(second)))
    return inner_products(first, second) / first.shape[-1]


def _kernel_mean(ours: Tensor, theirs: Tensor) -> Tensor:
    """Mean of `(x . y) ** 2` over the draws x of one network and y of the other, shape `(batch, draws, pixels)`."""
    draws = ours.shape[1] * theirs.shape[1]
    if ours.shape[-1] ** 2 < draws:  # the same sum from the smaller matrix, pixels by pixels instead of draws by draws
        return (inner_products(ours.mT, ours.mT) * inner_products(theirs.mT, theirs.mT)).sum((1, 2)) / draws
    return inner_products(ours, theirs).square().sum((1, 2)) / draws
