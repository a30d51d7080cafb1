"""A larger network teaches a regression: by how many degrees an image of MNIST is turned.

Every arm has four trials, two learning rates times two values of its own setting, judged by validation error on a seed
that is not among the final ones. Finished runs are kept in `regression_distillation.json`, so that the script may be
stopped and started again; the tables are in `regression_distillation.md`. The teacher lies beside them, and is trained
again if it is not there.

    python experiments/regression_distillation.py          all of MNIST, from LIGHTNING_COMPRESS_DATA or ../shared/data
    python experiments/regression_distillation.py --quick  a few batches of the shipped sample, to see that it works
"""

import sys
from itertools import product
from typing import Any

from common.distillation import ALONE, Candidate, Experiment, Settings, main, whole_mnist
from common.runs import data_folder

LEARNING_RATES = (0.004, 0.01)
DECAYS, SHARES = (0.0, 1e-5), (0.5, 0.8)


def data(settings: Settings) -> Any:
    from lightning_compress.recipes.students import TurnedMNIST

    return TurnedMNIST(data_folder() if settings.data == "all" else None, settings.batch_size)


def alone() -> list[Candidate]:
    return [
        Candidate({"learning_rate": rate, "weight_decay": decay}) for rate, decay in product(LEARNING_RATES, DECAYS)
    ]


def taught(losses: Any) -> list[Candidate]:
    return [
        Candidate({"learning_rate": rate}, {"alpha": share, "losses": losses})
        for rate, share in product(LEARNING_RATES, SHARES)
    ]


ANGLE = Experiment(
    task="angle",
    title="By how many degrees a digit of MNIST is turned",
    about=(
        "Each image is turned by an angle of its own, drawn once, evenly from -45 to 45 degrees; how far a digit leans "
        "by itself cannot be told from it, so that no network comes near 0. 55,000 images to train on, 5,000 to choose "
        "by, 10,000 to test. The task's loss is the squared error, the figure the mean absolute error."
    ),
    student="lightning_compress.recipes.students.Angle",
    teacher="lightning_compress.recipes.students.Angle",
    data=data,
    epochs=12,
    teacher_epochs=15,
    batch_size=256,
    metric="degrees",
    unit="degrees",
    scale=1.0,
    teaching={"learning_rate": 0.002, "channels": [20, 50], "hidden": 500},
    seeds=(0, 1, 2, 3, 4),
    trial_seeds=(100,),
    arms={
        ALONE: alone(),
        "bounded regression": taught("bounded_regression"),
        "hint at the output": taught("hint"),
    },
)
NOTES = """\
p is that of a two-sided paired t-test, without correction for several arms. The higher learning rate was chosen in
every arm, so that a still higher one may be better yet.
"""

if __name__ == "__main__":
    sys.exit(main(__file__, __doc__ or "", [ANGLE], whole_mnist, NOTES))
