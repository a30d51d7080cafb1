"""Losses of distillation: how far a student is from its teacher.

A loss asks for what it needs by naming it, and returns a scalar to be made small:

| name | what | shape |
|---|---|---|
| `student` | logits or features; a list of tensors for a loss over several layers | `(batch, ...)` |
| `teacher` | the same of the teacher, without gradient | `(batch, ...)` |
| `temperature` | what logits are divided by before they become probabilities, above 0 | |
| `target` | what is to be predicted: integer class labels | `(batch,)` |
| | for `bounded_regression`, real values | as `student` |
| `mask` | True where a token counts | `(batch, length)` |

Its other parameters are options with a default. What is in `logits`, `language` and `features` is a function. What is
in `learned` has parameters of its own: a module made once, of the shapes of one batch with its batch dimension
(`student_shape`, `teacher_shape`; lists of shapes for a loss over several layers) and of its options, then called like
a function. Features have shape `(batch, channels, *space)`, or `(batch, channels)`.

Every loss computes in float32, or wider if it is given more (maps with parameters in their own precision), and leaves
its inputs and the random stream as they are. Losses that soften probabilities carry the factor `temperature ** 2`.
"""

from lightning_compress.distillation.losses.features import (
    attention_transfer,
    fsp,
    hint,
    nst,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
)
from lightning_compress.distillation.losses.language import generalised_jsd, token_reverse_kl, token_soft_targets
from lightning_compress.distillation.losses.learned import Crd, FactorTransfer, ProjectedHint, ReviewKd, Vid
from lightning_compress.distillation.losses.logits import (
    bounded_regression,
    dist,
    dkd,
    multi_label,
    per_pixel,
    reverse_kl,
    soft_targets,
    squared_logits,
    standardised_soft_targets,
)

OFFERED = ("student", "teacher", "temperature", "target", "mask")

__all__ = [
    "OFFERED",
    "Crd",
    "FactorTransfer",
    "ProjectedHint",
    "ReviewKd",
    "Vid",
    "attention_transfer",
    "bounded_regression",
    "dist",
    "dkd",
    "fsp",
    "generalised_jsd",
    "hint",
    "multi_label",
    "nst",
    "per_pixel",
    "pkt",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "soft_targets",
    "squared_logits",
    "standardised_soft_targets",
    "token_reverse_kl",
    "token_soft_targets",
]
