"""Losses between features with parameters of their own, that are trained along with the student."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_compress.core.precision import to_float32
from lightning_compress.distillation.losses._layers import Convolutions, Fusion, as_parameters_of, pointwise
from lightning_compress.distillation.losses._precision import inner_products
from lightning_compress.distillation.losses._shapes import Shape, check_batch, check_layers, pool_to_same_size

ANY = (2, 3, 4, 5)  # dimensions of (batch, channels) and of (batch, channels, *space)
IMAGES = (4,)


class ProjectedHint(nn.Module):
    """Mean squared difference of features, the student's brought to the teacher's channels by a linear map.

    Args:
        student_shape, teacher_shape: of features, `(batch, channels, *space)` or `(batch, channels)`. Without a
            difference in channels there is no map. Where space differs, the larger is averaged down to the smaller.

    Raises:
        ValueError: if the batches or the numbers of dimensions differ.

    Reference: Romero et al., 2015, section 2.2, https://arxiv.org/abs/1412.6550
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape) -> None:
        super().__init__()
        check_batch(student_shape, teacher_shape, ANY)
        channels, wanted = student_shape[1], teacher_shape[1]
        self.project = nn.Identity() if channels == wanted else pointwise(len(student_shape), channels, wanted)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_batch(student.shape, teacher.shape, ANY)
        projected = self.project(as_parameters_of(self, student))
        return functional.mse_loss(*pool_to_same_size(to_float32(projected), to_float32(teacher)))


class Vid(nn.Module):
    """Variational information distillation: how unlikely the teacher's features are, as guessed from the student's.

    The guess is a normal distribution: its mean comes from three pointwise maps with ReLU between them, its variance is
    one learned number per channel. The loss is negative log-likelihood without its constant, and can be below 0.

    Args:
        student_shape, teacher_shape: of features, `(batch, channels, *space)` or `(batch, channels)`. Where space
            differs, the larger is averaged down to the smaller.
        initial_variance: above `least_variance`, in squares of the teacher's unit.
        least_variance: below which no variance falls, above 0.

    Returns:
        Scalar in nats, the mean over batch, channels and places.

    Raises:
        ValueError: if the shapes do not fit, or the variances do not.

    Reference: Ahn et al., 2019, section 3.1, https://arxiv.org/abs/1904.05835
    """

    def __init__(
        self, student_shape: Shape, teacher_shape: Shape, initial_variance: float = 5.0, least_variance: float = 1e-5
    ) -> None:
        super().__init__()
        check_batch(student_shape, teacher_shape, ANY)
        if not 0 < least_variance < initial_variance:
            raise ValueError(
                f"0 < least_variance < initial_variance, but they are {least_variance} and {initial_variance}."
            )
        dimensions, channels, wanted = len(student_shape), student_shape[1], teacher_shape[1]
        self.mean = nn.Sequential(
            pointwise(dimensions, channels, wanted),
            nn.ReLU(),
            pointwise(dimensions, wanted, wanted),
            nn.ReLU(),
            pointwise(dimensions, wanted, wanted),
        )
        self.least_variance = least_variance
        # The inverse of softplus.
        self.scale = nn.Parameter(torch.full((wanted,), math.log(math.expm1(initial_variance - least_variance))))

    @property
    def variance(self) -> Tensor:
        """The variance of each of the teacher's channels, shape `(channels,)`."""
        return functional.softplus(to_float32(self.scale)) + self.least_variance

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_batch(student.shape, teacher.shape, ANY)
        student, teacher = pool_to_same_size(student, to_float32(teacher))
        guess = to_float32(self.mean(as_parameters_of(self, student)))
        variance = self.variance.reshape(-1, *[1] * (teacher.ndim - 2))
        return 0.5 * ((guess - teacher).square() / variance + variance.log()).mean()


class FactorTransfer(nn.Module):
    """Mean absolute difference of factors: what a paraphraser makes of the teacher, and a translator of the student.

    The paraphraser learns to build the teacher's features again from the factor, here while the student learns (the
    authors train it before); its mean squared error is part of the loss. The student's part gives it no gradient.

    Args:
        student_shape, teacher_shape: of features, `(batch, channels, height, width)`. Where space differs, the larger
            is averaged down to the smaller.
        rate: channels of the factor, as a share of the teacher's, above 0.

    Raises:
        ValueError: if the shapes do not fit, or the rate is not above 0.

    Reference: Kim et al., 2018, section 3, https://arxiv.org/abs/1802.04977
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, rate: float = 0.5) -> None:
        super().__init__()
        check_batch(student_shape, teacher_shape, IMAGES)
        if not 0 < rate < math.inf:
            raise ValueError(f"rate is a share of the teacher's channels above 0, but is {rate}.")
        ours, theirs = student_shape[1], teacher_shape[1]
        factor = max(round(rate * theirs), 1)
        self.paraphrase = Convolutions([theirs, theirs, factor, factor])
        self.rebuild = Convolutions([factor, factor, theirs, theirs], nn.ConvTranspose2d)
        self.translate = Convolutions([ours, ours, factor, factor])

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_batch(student.shape, teacher.shape, IMAGES)
        factor = self.paraphrase(as_parameters_of(self, teacher))
        rebuilt = functional.mse_loss(to_float32(self.rebuild(factor)), to_float32(teacher))
        translated = self.translate(as_parameters_of(self, student))
        pair = pool_to_same_size(to_float32(translated), to_float32(factor).detach())
        ours, theirs = (functional.normalize(one.flatten(1)) for one in pair)
        return rebuilt + functional.l1_loss(ours, theirs)


class ReviewKd(nn.Module):
    """Knowledge review: each stage of the teacher guides that of the student and all deeper ones.

    From the deepest stage on, a stage is fused with what the deeper ones gave, and compared with the teacher's as it is
    and averaged down to 4x4, 2x2 and 1x1, where that is smaller.

    Args:
        student_shape, teacher_shape: of features of stages from the first to the deepest, as many of each, each
            `(batch, channels, height, width)`.
        width: channels in the fusion; those of the student's deepest stage, but 512 at most, if it is not given.

    Returns:
        Scalar, the sum over stages of the weighted mean (1, 1/2, 1/4, 1/8) over sizes of mean squared differences.

    Raises:
        ValueError: if there are not as many stages of each, or their shapes do not fit.

    Reference: Chen et al., 2021, section 3, https://arxiv.org/abs/2104.09044
    """

    def __init__(
        self, student_shape: Sequence[Shape], teacher_shape: Sequence[Shape], width: int | None = None
    ) -> None:
        super().__init__()
        check_layers(student_shape, teacher_shape)
        for ours, theirs in zip(student_shape, teacher_shape, strict=True):
            check_batch(ours, theirs, IMAGES)
        between = min(student_shape[-1][1], 512) if width is None else width
        self.fusions = nn.ModuleList(
            Fusion(ours[1], between, theirs[1], deepest=depth == len(student_shape))
            for depth, (ours, theirs) in enumerate(zip(student_shape, teacher_shape, strict=True), start=1)
        )

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        check_layers(student, teacher, number=len(self.fusions))
        losses, deeper = [], None
        for fusion, ours, theirs in reversed(list(zip(self.fusions, student, teacher, strict=True))):
            check_batch(ours.shape, theirs.shape, IMAGES)
            output, deeper = fusion(ours, deeper, theirs.shape[2:])
            losses.append(_at_several_sizes(to_float32(output), to_float32(theirs)))
        return torch.stack(losses).sum()


class Crd(nn.Module):
    """Contrastive distillation: of many samples, which is the same one that the other network saw?

    Both networks' features are embedded linearly, as vectors of length 1. The student's embedding has to find the
    teacher's of the same sample among the rest of the batch and a memory, the teacher's that of the student among the
    rest of the batch; each is a cross-entropy.

    The paper draws negatives by their index in the dataset and tells them apart one by one. A loader gives no index, so
    that here negatives are the rest of the batch and the last `memory` embeddings of the teacher from training, and
    there is one choice among all. A sample that comes back while it is in the memory is its own negative: keep the
    memory smaller than the dataset.

    Args:
        student_shape, teacher_shape: of features, `(batch, ...)`, flattened; as a rule those before the classifier.
        features: length of the embeddings.
        memory: number of embeddings kept, from 0.
        contrast: temperature of the choice, above 0, by which cosines are divided; the `temperature` of logits is
            another.

    Returns:
        Scalar in nats, the mean over the batch of the sum of both cross-entropies.

    Raises:
        ValueError: if the batches differ, or an option is out of its range.

    Reference: Tian et al., 2020, section 3, https://arxiv.org/abs/1910.10699; the choice among all:
    van den Oord et al., 2018, section 2.3, https://arxiv.org/abs/1807.03748
    """

    queue: Tensor
    filled: Tensor

    def __init__(
        self,
        student_shape: Shape,
        teacher_shape: Shape,
        features: int = 128,
        memory: int = 4096,
        contrast: float = 0.07,
    ) -> None:
        super().__init__()
        check_batch(student_shape, teacher_shape)
        if features < 1 or memory < 0 or not 0 < contrast < math.inf:
            raise ValueError(
                f"features is 1 or more, memory 0 or more and contrast above 0, but they are {features}, {memory} and "
                f"{contrast}."
            )
        self.embed_student = nn.Linear(math.prod(student_shape[1:]), features)
        self.embed_teacher = nn.Linear(math.prod(teacher_shape[1:]), features)
        self.contrast = contrast
        self.register_buffer("queue", torch.zeros(memory, features))
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        check_batch(student.shape, teacher.shape)
        ours, theirs = _embedded(self.embed_student, student), _embedded(self.embed_teacher, teacher)
        empty = torch.arange(len(self.queue), device=ours.device) >= self.filled
        among_memory = inner_products(ours, self.queue).masked_fill(empty, -math.inf)
        same = torch.arange(len(ours), device=ours.device)
        find_teacher = torch.cat([inner_products(ours, theirs), among_memory], dim=1) / self.contrast
        find_student = inner_products(theirs, ours) / self.contrast
        if self.training:
            self._remember(theirs.detach())
        return functional.cross_entropy(find_teacher, same) + functional.cross_entropy(find_student, same)

    def _remember(self, embeddings: Tensor) -> None:
        # New tensors, newest first: the old ones are still needed by the backward pass.
        memory = len(self.queue)
        self.queue = torch.cat([embeddings.to(self.queue.dtype), self.queue])[:memory]
        self.filled = (self.filled + len(embeddings)).clamp(max=memory)


def _embedded(embed: nn.Linear, features: Tensor) -> Tensor:
    return functional.normalize(to_float32(embed(as_parameters_of(embed, features).flatten(1))))


def _at_several_sizes(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference as it is and averaged down, each size with half the weight of the one before."""
    sizes = [size for size in (4, 2, 1) if size < min(student.shape[2:])]
    pool = functional.adaptive_avg_pool2d
    pairs = [(student, teacher), *((pool(student, size), pool(teacher, size)) for size in sizes)]
    losses = torch.stack([functional.mse_loss(*pair) for pair in pairs])
    weights = 0.5 ** torch.arange(len(pairs), device=losses.device)
    return (losses * weights).sum() / weights.sum()
