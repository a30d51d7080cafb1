"""ResNet-20 on CIFAR-10: `ChannelPruning` to half of its MACs by several criteria, beside the thin net from scratch.

Every run has the same epochs, learning rate and data; the shrinking ones differ from the dense one by one callback.
All layers lose the same fraction of their channels, so that the criteria are compared at equal widths, and one thin net
from scratch is the control of all. Each run is a process of one thread. Finished runs are kept in
`cifar10_channels.json`, so that the script may be stopped and started again; the table is in `cifar10_channels.md`.

    python experiments/cifar10_channels.py          from LIGHTNING_COMPRESS_DATA or ../shared/data
    python experiments/cifar10_channels.py --quick  a few batches of noise, to see that it works

The test images are read once per run, with the epoch that has the smallest error on 5,000 training images held back,
of a shrinking run among the epochs after the last cut. Nothing was searched for: each row is the first setting tried.
"""

from typing import Any

from cifar10_distillation import data, needed

from common.channel_pruning import Experiment, Settings, main


def model(settings: Settings) -> Any:
    import torch

    from lightning_compress.recipes.cifar10 import ResNet

    network = ResNet(1 if settings.data == "quick" else 3, settings.learning_rate)
    return network.to(memory_format=torch.channels_last)


def example() -> Any:
    import torch

    return torch.zeros(1, 3, 32, 32)


EXPERIMENT = Experiment(
    script=__file__,
    title="ResNet-20 on CIFAR-10, to half of its MACs while it trains",
    model=model,
    data=data,
    example=example,
    arms={
        "l2": {"criterion": "l2"},
        "fpgm": {"criterion": "fpgm"},
        "taylor": {"criterion": "taylor"},
        "slimming": {"criterion": "slimming", "penalty": "slimming", "penalty_strength": 1e-4},
        "l2, soft until the last cut": {"criterion": "l2", "soft": True},
        "random": {"criterion": "random"},
    },
    words=(
        "The images were stored as JPEG, which loses a little: figures are not quite comparable with those on the "
        "original pixels. In bfloat16 autocast. So few epochs leave every net far from what it reaches in 200, as "
        "papers train it; compared are equal epochs."
    ),
    trainer={"precision": "bf16-mixed"},
    defaults={"epochs": 3, "batch_size": 128, "learning_rate": 0.2, "macs": 0.5},
    quick={"epochs": 3, "batches": 4, "batch_size": 16, "data": "quick"},
    needed=needed,
)

if __name__ == "__main__":
    main(EXPERIMENT)
