"""LeNet-5 teaches a network of a fiftieth of its size: all of MNIST, against label smoothing and no teacher.

Every arm has six trials, three learning rates times two values of its own setting, judged by validation error on two
seeds that are not among the final ones. Finished runs are kept in `mnist_distillation.json`, so that the script may be
stopped and started again; the tables are in `mnist_distillation.md`. The teacher lies beside them, and is trained
again if it is not there.

    python results/mnist_distillation.py              all of MNIST, from LIGHTNING_COMPRESS_DATA or ../shared/data
    python results/mnist_distillation.py --quick      a few batches of the shipped sample, to see that it works
"""

import sys
from itertools import product
from typing import Any

from _distilled import ALONE, Candidate, Experiment, Settings, main, whole_mnist
from _runs import data_folder

LEARNING_RATES = (0.004, 0.008, 0.016)
TEACHINGS = ({"temperature": 4.0, "alpha": 0.9}, {"temperature": 8.0, "alpha": 0.95})


def data(settings: Settings) -> Any:
    from lightning_compress.recipes.mnist import MNIST

    return MNIST(data_folder() if settings.data == "all" else None, settings.batch_size)


MNIST = Experiment(
    task="mnist",
    title="A narrow LeNet-5",
    about=(
        "55,000 images to train on, 5,000 to choose by, 10,000 to test. The teacher was trained once, on images "
        "turned, scaled and shifted by chance, and knows more than they show; the students see the images as they are. "
        "Adam, one-cycle. Label smoothing and distillation change the loss and nothing else."
    ),
    student="lightning_compress.recipes.students.NarrowLeNet5",
    teacher="lightning_compress.recipes.students.MovedLeNet5",
    data=data,
    epochs=15,
    teacher_epochs=30,
    batch_size=256,
    teaching={"learning_rate": 0.003},
    seeds=(0, 1, 2, 3, 4),
    trial_seeds=(100, 101),
    arms={
        ALONE: [
            Candidate({"learning_rate": rate, "weight_decay": decay})
            for rate, decay in product(LEARNING_RATES, (0.0, 1e-5))
        ],
        "label smoothing": [
            Candidate({"learning_rate": rate, "label_smoothing": share})
            for rate, share in product(LEARNING_RATES, (0.05, 0.1))
        ],
        "distillation": [
            Candidate({"learning_rate": rate}, teaching) for rate, teaching in product(LEARNING_RATES, TEACHINGS)
        ],
    },
)
NOTES = """\
p is that of a two-sided paired t-test, without correction for several arms. One standard deviation of the sampling
noise of 10,000 test images is about 0.1 points at 1 % error; it is shared by all arms, since the test images are.
No arm is better than another beyond the noise: distillation gains nothing here. The teacher is not much better than the
student, and no better than the LeNet-5 without augmentation in mnist_pruning.md. The learning rate that was chosen with
label smoothing and with a teacher is the highest that was tried.
"""

if __name__ == "__main__":
    sys.exit(main(__file__, __doc__ or "", [MNIST], whole_mnist, NOTES))
