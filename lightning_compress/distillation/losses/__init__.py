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
from lightning_compress.distillation.losses.language import generalised_jsd, token_kl_divergence, token_reverse_kl
from lightning_compress.distillation.losses.learned import Crd, FactorTransfer, ProjectedHint, ReviewKd, Vid
from lightning_compress.distillation.losses.logits import (
    binary_kl,
    bounded_regression,
    dist,
    dkd,
    kl_divergence,
    logit_mse,
    per_pixel_kl,
    reverse_kl,
    standardised_kl_divergence,
)

# New names of losses by old ones, for the words of an error.
RENAMED = {
    "soft_targets": "kl_divergence",
    "squared_logits": "logit_mse",
    "multi_label": "binary_kl",
    "per_pixel": "per_pixel_kl",
    "standardised_soft_targets": "standardised_kl_divergence",
    "token_soft_targets": "token_kl_divergence",
}
OFFERED = ("student", "teacher", "temperature", "target", "mask")

__all__ = [
    "OFFERED",
    "RENAMED",
    "Crd",
    "FactorTransfer",
    "ProjectedHint",
    "ReviewKd",
    "Vid",
    "attention_transfer",
    "binary_kl",
    "bounded_regression",
    "dist",
    "dkd",
    "fsp",
    "generalised_jsd",
    "hint",
    "kl_divergence",
    "logit_mse",
    "nst",
    "per_pixel_kl",
    "pkt",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "standardised_kl_divergence",
    "token_kl_divergence",
    "token_reverse_kl",
]
