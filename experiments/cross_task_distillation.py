"""A teacher of another task: what it sees, but not what it says, for a student that is given few images.

Every arm has four trials, two learning rates times two values of its own setting, judged by validation error on a seed
that is not among the final ones. Finished runs are kept in `cross_task_distillation.json`, so that the script may be
stopped and started again; the tables are in `cross_task_distillation.md`. The teacher lies beside them, and is trained
again if it is not there.

    python experiments/cross_task_distillation.py          all of MNIST, from LIGHTNING_COMPRESS_DATA or ../shared/data
    python experiments/cross_task_distillation.py --quick  a few batches of the shipped sample, to see that it works
"""

import sys
from itertools import product
from typing import Any

from common.distillation import ALONE, TEACHER, Candidate, Experiment, Settings, main, whole_mnist
from common.runs import data_folder

LEARNING_RATES = (0.004, 0.01)
DECAYS, SHARES = (0.0, 1e-4), (0.5, 0.9)
FEW, SEE = 2000, {"conv2 -> conv2": "projected_hint"}


def data(settings: Settings) -> Any:
    from lightning_compress.recipes.mnist import MNIST

    whole = settings.data == "all"
    limit = FEW if whole and settings.arm != TEACHER else None
    return MNIST(data_folder() if whole else None, settings.batch_size, limit=limit)


def alone() -> list[Candidate]:
    return [
        Candidate({"learning_rate": rate, "weight_decay": decay}) for rate, decay in product(LEARNING_RATES, DECAYS)
    ]


def taught(losses: Any) -> list[Candidate]:
    return [
        Candidate({"learning_rate": rate}, {"alpha": share, "losses": losses})
        for rate, share in product(LEARNING_RATES, SHARES)
    ]


PARITY = Experiment(
    task="parity",
    title="Is a digit even, from a teacher that knows all ten",
    about=(
        f"The teacher was trained to tell the ten digits of 55,000 images, turned, scaled and shifted by chance. The "
        f"student is given {FEW:,} images and whether each is even; only what the two see is compared, in their second "
        f"convolution (`projected_hint`), and nothing is said of their outputs. 5,000 images to choose by, 10,000 to "
        f"test. The student without a teacher has the same images: what the teacher saw of others reaches the student "
        f"through its features alone."
    ),
    student="lightning_compress.recipes.students.Parity",
    teacher="lightning_compress.recipes.students.MovedLeNet5",
    data=data,
    epochs=40,
    teacher_epochs=12,
    batch_size=64,
    teaching={"learning_rate": 0.003},
    seeds=(0, 1, 2, 3, 4),
    trial_seeds=(100,),
    arms={ALONE: alone(), "features of another task": taught(SEE)},
)
NOTES = """\
p is that of a two-sided paired t-test. The difference is within the noise: nothing is gained here.
"""

if __name__ == "__main__":
    sys.exit(main(__file__, __doc__ or "", [PARITY], whole_mnist, NOTES))
