"""LeNet-5 on all of MNIST: in float32, and with `QuantizationAwareTraining` from 8 bits to 1, several seeds.

Every run has the same epochs, learning rate and data; the quantized ones differ by one callback, which begins after a
third of the run. Each run is a process of one thread. Finished runs are kept in `mnist_quantization.json`, so that the
script may be stopped and started again; the table is in `mnist_quantization.md`.

    python experiments/mnist_quantization.py          all of MNIST, from LIGHTNING_COMPRESS_DATA or ../shared/data
    python experiments/mnist_quantization.py --quick  a few batches of the shipped sample, to see that it works

The test images are read once per run, with the epoch that has the smallest error on 5,000 training images held back;
of a quantized run only quantized epochs count (`gate_best`, the default). Nothing was searched for: each row is the
first setting that was tried.
"""

from typing import Any

from common.quantization import FLOAT, Experiment, Settings, main
from common.runs import data_folder


def model(settings: Settings) -> Any:
    from lightning_compress.recipes.mnist import LeNet5

    return LeNet5(settings.learning_rate)


def data(settings: Settings) -> Any:
    from lightning_compress.recipes.mnist import MNIST

    return MNIST(data_folder() if settings.data == "full" else None, settings.batch_size)


def example() -> Any:
    import torch

    return torch.zeros(8, 1, 28, 28)


def needed() -> str | None:
    if data_folder() is not None:
        return None
    return "All of MNIST is needed: name its folder by LIGHTNING_COMPRESS_DATA, or try --quick."


EXPERIMENT = Experiment(
    script=__file__,
    title="LeNet-5 on MNIST, quantized while it trains",
    model=model,
    data=data,
    example=example,
    schemes={
        FLOAT: {},
        "W8A8": {"weights": 8, "activations": 8},
        "W4A4": {"weights": 4, "activations": 4},
        "W2A2": {"weights": 2, "activations": 2},
        "ternary weights, A8": {"weights": "ternary", "activations": 8},
        "binary weights, A8": {"weights": "binary", "activations": 8},
        "binary weights and activations": {"weights": "binary", "activations": "binary"},
    },
    papers={
        "ternary weights, A8": "TWN 0.65 % (Li et al., 2016; a net of its own)",
        "binary weights, A8": "BinaryConnect 1.29 % (Courbariaux et al., 2015; a net without convolutions)",
        "binary weights and activations": "BNN 0.96 % (Courbariaux et al., 2016; a net without convolutions)",
    },
    words=(
        "First and last layer have 8 bits where the others have fewer, as in the papers of LSQ, PACT and DoReFa. One "
        "standard error of an error of 1 % on 10,000 images is 0.10 points. The papers train for many more epochs."
    ),
    defaults={"epochs": 6, "batch_size": 128, "learning_rate": 0.002},
    quick={"epochs": 3, "batches": 4, "data": "sample"},
    needed=needed,
)

if __name__ == "__main__":
    main(EXPERIMENT)
