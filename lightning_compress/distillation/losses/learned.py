"""Losses between features with parameters of their own, which are trained along with the student."""

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
    """Mean squared difference of features, after a linear map from the student's channels to the teacher's.

    Args:
        student_shape, teacher_shape: of features, `(batch, channels, *space)` or `(batch, channels)`. With equal
            channels there is no map. Where space differs, the larger is averaged down to the smaller.

    Raises:
        ValueError: if the batches or the numbers of dimensions differ.

    Reference: Romero et al., 2015, section 2.2, https://arxiv.org/abs/1412.6550

    >>> loss = ProjectedHint(student_shape=(8, 4), teacher_shape=(8, 6))
    >>> projected = loss.project.weight @ torch.ones(4)  # what a student of ones is mapped to
    >>> loss(torch.ones(8, 4), projected.expand(8, 6)).item() < 1e-6
    True
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
    """Variational information distillation: negative log-likelihood of the teacher's features given the student's.

    The likelihood is a normal distribution. Three pointwise maps with ReLU between them compute its mean from the
    student's features; its variance is one learned number per channel. The constant is left out, so that the loss can
    be below 0.

    Args:
        student_shape, teacher_shape: of features, `(batch, channels, *space)` or `(batch, channels)`. Where space
            differs, the larger is averaged down to the smaller.
        initial_variance: above `least_variance`, in squares of the teacher's unit.
        least_variance: lower bound of the variance, above 0.

    Returns:
        Scalar in nats, the mean over batch, channels and pixels.

    Raises:
        ValueError: if the shapes do not fit, or not `0 < least_variance < initial_variance`.

    Reference: Ahn et al., 2019, section 3.1, https://arxiv.org/abs/1904.05835

    >>> loss, student = Vid(student_shape=(8, 4), teacher_shape=(8, 6)), torch.randn(8, 4)
    >>> round(loss(student, teacher=loss.mean(student)).item(), 4)  # a mean without error: 0.5 ln 5
    0.8047
    """

    def __init__(
        self, student_shape: Shape, teacher_shape: Shape, initial_variance: float = 5.0, least_variance: float = 1e-5
    ) -> None:
        super().__init__()
        check_batch(student_shape, teacher_shape, ANY)
        if not 0 < least_variance < initial_variance:
            raise ValueError(
                f"Vid needs 0 < least_variance < initial_variance, but they are {least_variance} and "
                f"{initial_variance}. The defaults are 1e-5 and 5.0."
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
        # The inverse of softplus, so that the variance begins at `initial_variance`.
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
    """Mean absolute difference of two factors: the encoded features of the teacher and of the student.

    A paraphraser encodes the teacher's features, a translator the student's.
    The paraphraser is an autoencoder of the teacher's features. The authors train it before the student; here it learns
    at the same time, and its mean squared reconstruction error is part of the loss. The difference of the factors gives
    the paraphraser no gradient.

    Args:
        student_shape, teacher_shape: of features, `(batch, channels, height, width)`. Where space differs, the larger
            is averaged down to the smaller.
        rate: channels of the factor, as a share of the teacher's, above 0.

    Raises:
        ValueError: if the shapes do not fit, or the rate is not above 0.

    Reference: Kim et al., 2018, section 3, https://arxiv.org/abs/1802.04977

    >>> loss = FactorTransfer(student_shape=(2, 4, 5, 5), teacher_shape=(2, 16, 5, 5), rate=0.5)
    >>> loss.translate(torch.ones(2, 4, 5, 5)).shape, loss.paraphrase(torch.ones(2, 16, 5, 5)).shape
    (torch.Size([2, 8, 5, 5]), torch.Size([2, 8, 5, 5]))
    >>> loss(torch.ones(2, 4, 5, 5), torch.ones(2, 16, 5, 5)).shape
    torch.Size([])
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, rate: float = 0.5) -> None:
        super().__init__()
        check_batch(student_shape, teacher_shape, IMAGES)
        if not 0 < rate < math.inf:
            raise ValueError(f"rate is a share of the teacher's channels, above 0, but is {rate}. 0.5 is usual.")
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
    """Knowledge review: a stage of the teacher guides the same stage of the student and all deeper stages.

    From the deepest stage to the first, the student's features are fused with those of the deeper stages, and compared
    with the teacher's at full size and averaged down to 4x4, 2x2 and 1x1, as far as these sizes are smaller.

    Args:
        student_shape, teacher_shape: of features of stages from the first to the deepest, as many for the teacher as
            for the student, each `(batch, channels, height, width)`.
        width: channels in the fusion; None: those of the student's deepest stage, but at most 512.

    Returns:
        Scalar, the sum over stages of the weighted mean (1, 1/2, 1/4, 1/8) over sizes of mean squared differences.

    Raises:
        ValueError: if the numbers of stages differ, or their shapes do not fit.

    Reference: Chen et al., 2021, section 3, https://arxiv.org/abs/2104.09044

    >>> student_shape, teacher_shape = [(2, 4, 8, 8), (2, 8, 4, 4)], [(2, 6, 8, 8), (2, 12, 4, 4)]
    >>> loss = ReviewKd(student_shape, teacher_shape)
    >>> for fusion in loss.fusions:
    ...     _ = nn.init.zeros_(fusion.out[1].weight)  # the last BatchNorm: all fused features become 0
    >>> student, teacher = [torch.randn(one) for one in student_shape], [torch.ones(one) for one in teacher_shape]
    >>> loss(student, teacher).item()  # two stages, each with mean squared difference 1 at all sizes
    2.0
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
    """Contrastive distillation: find the teacher's features of a sample among those of many samples.

    Linear maps embed the features of both networks as vectors of length 1. Two cross-entropies are added: the student's
    embedding of a sample has to select the teacher's embedding of the same sample among the batch and a memory, and
    the teacher's embedding has to select the student's among the batch.

    The paper draws negatives by their index in the dataset, and classifies each negative separately. A loader gives no
    index, so that negatives here are the other samples of the batch and the last `memory` teacher embeddings of the
    training, and all are classified at once. A sample that is seen again while it is in the memory is its own negative:
    keep the memory smaller than the dataset.

    Args:
        student_shape, teacher_shape: of features, `(batch, ...)`, flattened; as a rule those before the classifier.
        features: length of the embeddings.
        memory: number of embeddings kept, at least 0.
        contrast: temperature that divides the cosines, above 0; not the `temperature` of logits.

    Returns:
        Scalar in nats, the mean over the batch of the sum of both cross-entropies.

    Raises:
        ValueError: if the batches differ, or an option is out of its range.

    Reference: Tian et al., 2020, section 3, https://arxiv.org/abs/1910.10699; one cross-entropy over all negatives:
    van den Oord et al., 2018, section 2.3, https://arxiv.org/abs/1807.03748

    >>> loss = Crd(student_shape=(2, 4), teacher_shape=(2, 6), features=3, memory=0)
    >>> for embed in (loss.embed_student, loss.embed_teacher):
    ...     _ = nn.init.zeros_(embed.weight)  # only the bias is left: both samples have the same embedding
    >>> round(loss(torch.randn(2, 4), torch.randn(2, 6)).item(), 4)  # a guess among two, twice: 2 ln 2
    1.3863
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
                f"{contrast}. The defaults are 128, 4096 and 0.07."
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
        # New tensors, newest first: the backward pass still needs the old ones.
        memory = len(self.queue)
        self.queue = torch.cat([embeddings.to(self.queue.dtype), self.queue])[:memory]
        self.filled = (self.filled + len(embeddings)).clamp(max=memory)


def _embedded(embed: nn.Linear, features: Tensor) -> Tensor:
    return functional.normalize(to_float32(embed(as_parameters_of(embed, features).flatten(1))))


def _at_several_sizes(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference at full size and averaged down; each smaller size has half the weight."""
    sizes = [size for size in (4, 2, 1) if size < min(student.shape[2:])]
    pool = functional.adaptive_avg_pool2d
    pairs = [(student, teacher), *((pool(student, size), pool(teacher, size)) for size in sizes)]
    losses = torch.stack([functional.mse_loss(*pair) for pair in pairs])
    weights = 0.5 ** torch.arange(len(pairs), device=losses.device)
    return (losses * weights).sum() / weights.sum()
