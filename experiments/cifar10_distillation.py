"""ResNet-20 teaches ResNet-8 on CIFAR-10: soft targets, and where to look, against label smoothing and no teacher.

Every arm has four trials, two learning rates times two values of its own setting, judged by validation error on a seed
that is not among the final ones. Finished runs are kept in `cifar10_distillation.json`, so that the script may be
stopped and started again; the tables are in `cifar10_distillation.md`. The teacher lies beside them, and is trained
again if it is not there.

    python experiments/cifar10_distillation.py          from LIGHTNING_COMPRESS_DATA or ../shared/data
    python experiments/cifar10_distillation.py --quick  a few batches of noise, to see that it works

In that folder lies `cifar-10-batches-py`, or `unpack-cifar10`, a command that writes it elsewhere.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from common.distillation import ALONE, Candidate, Experiment, Settings, main
from common.runs import DATA_VARIABLE, data_folder

FOLDER, UNPACK = "cifar-10-batches-py", "unpack-cifar10"
UNPACKED = Path(tempfile.gettempdir()) / "lightning_compress_cifar10"
LEARNING_RATES = (0.2, 0.5)
LOOK = {f"stages.{stage}": {"loss": "attention_transfer", "weight": 1000.0} for stage in range(3)}


def data(settings: Settings) -> Any:
    from lightning_compress.recipes.cifar10 import CIFAR10

    if settings.data == "quick":
        return CIFAR10(noise(), settings.batch_size, validation=40)
    folder = data_folder() or UNPACKED
    return CIFAR10(folder if (folder / FOLDER).is_dir() else UNPACKED, settings.batch_size)


def noise() -> Path:
    """A folder of random images in the form of CIFAR-10's files."""
    import numpy

    chance, folder = numpy.random.default_rng(0), Path(tempfile.gettempdir()) / f"noise_{os.getpid()}"
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for name in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        pixels = chance.integers(0, 256, (40, 3072), dtype=numpy.uint8)
        content = pickle.dumps({b"data": pixels, b"labels": [place % 10 for place in range(40)]}, protocol=2)
        (folder / FOLDER / name).write_bytes(content)
    return folder


def needed() -> str | None:
    """Unpack the images if that is what it takes; what is missing otherwise."""
    folder = data_folder()
    if folder is not None and (folder / FOLDER).is_dir():
        return None
    if folder is not None and (folder / UNPACK).is_file():
        if not (UNPACKED / FOLDER / "batches.meta").is_file():  # the last file that it writes
            subprocess.run([sys.executable, str(folder / UNPACK), str(UNPACKED)], check=True)
        return None
    return (
        f"There is no {FOLDER} here. Name the folder that holds it in {DATA_VARIABLE}, or see that it works: --quick."
    )


CIFAR = Experiment(
    task="cifar10",
    title="ResNet-8 from ResNet-20",
    about=(
        "45,000 images to train on, 5,000 to choose by, 10,000 to test. The images were stored as JPEG, which loses a "
        "little: figures are not quite comparable with those on the original pixels. Shifted by up to 4 pixels and "
        "mirrored by chance, the same view for teacher and student. SGD with Nesterov momentum, one-cycle, in bfloat16 "
        "autocast. The teacher was trained once."
    ),
    student="lightning_compress.recipes.cifar10.ResNet",
    teacher="lightning_compress.recipes.cifar10.ResNet",
    data=data,
    epochs=24,
    teacher_epochs=40,
    batch_size=512,
    fixed={"depth": 1},
    teaching={"depth": 3, "learning_rate": 0.4},
    seeds=(0, 1, 2, 3),
    trial_seeds=(100,),
    precision="bf16-mixed",
    channels_last=True,
    arms={
        ALONE: [
            Candidate({"learning_rate": rate, "weight_decay": decay})
            for rate, decay in product(LEARNING_RATES, (2e-4, 5e-4))
        ],
        "label smoothing": [
            Candidate({"learning_rate": rate, "label_smoothing": share})
            for rate, share in product(LEARNING_RATES, (0.05, 0.1))
        ],
        "soft targets": [
            Candidate({"learning_rate": rate}, {"temperature": temperature, "alpha": 0.9})
            for rate, temperature in product(LEARNING_RATES, (2.0, 4.0))
        ],
        "soft targets and attention": [
            Candidate(
                {"learning_rate": rate},
                {"temperature": temperature, "alpha": 0.9, "losses": {"output": "kl_divergence", **LOOK}},
            )
            for rate, temperature in product(LEARNING_RATES, (2.0, 4.0))
        ],
    },
)
NOTES = """\
p is that of a two-sided paired t-test, without correction for several arms. Learning rate, weight decay 5e-4 where none
is named, and epochs are those of short runs: longer ones may give smaller errors, and other differences. The higher
learning rate was chosen in every arm, so that a still higher one may be better yet. Attention transfer on top of soft
targets, with the weight of its authors, is worse here than soft targets alone.

For orientation, KDZ reports for ResNet-110 to ResNet-20, untuned: accuracy 92.37 without a teacher, 92.82 by soft
targets, 93.21 by attention transfer. Both networks are larger there, and training is longer and on the original pixels:
the figures are quoted, not reproduced.
"""

if __name__ == "__main__":
    sys.exit(main(__file__, __doc__ or "", [CIFAR], needed, NOTES))
