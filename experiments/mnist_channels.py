"""LeNet-5 on all of MNIST: `ChannelPruning` to a quarter of its MACs, beside the thin net trained from scratch.

Every run has the same epochs, learning rate and data; the shrinking ones differ from the dense one by one callback.
Each run is a process of one thread. Finished runs are kept in `mnist_channels.json`, so that the script may be stopped
and started again; the table is in `mnist_channels.md`.

    python experiments/mnist_channels.py          all of MNIST, from LIGHTNING_COMPRESS_DATA or ../shared/data
    python experiments/mnist_channels.py --quick  a few batches of the shipped sample, to see that it works

The test images are read once per run, with the epoch that has the smallest error on 5,000 training images held back,
of a shrinking run among the epochs after the last cut. Nothing was searched for: each row is the first setting tried.
"""

from typing import Any

from mnist_quantization import data, needed

from common.channel_pruning import Experiment, Settings, main


def model(settings: Settings) -> Any:
    from lightning_compress.recipes.mnist import LeNet5

    return LeNet5(settings.learning_rate)


def example() -> Any:
    import torch

    return torch.zeros(1, 1, 28, 28)


EXPERIMENT = Experiment(
    script=__file__,
    title="LeNet-5 on MNIST, to a quarter of its MACs while it trains",
    model=model,
    data=data,
    example=example,
    arms={
        "l2": {"criterion": "l2"},
        "taylor": {"criterion": "taylor"},
    },
    words="One standard error of an error of 0.8 % on 10,000 images is 0.09 points.",
    defaults={"epochs": 8, "batch_size": 128, "learning_rate": 0.002, "macs": 0.25},
    quick={"epochs": 3, "batches": 6, "data": "sample"},
    needed=needed,
)

if __name__ == "__main__":
    main(EXPERIMENT)
