"""ResNet-20 on CIFAR-10: in float32, and with `QuantizationAwareTraining` at 8 and 4 bits, for equal epochs.

The quantized runs differ from the float32 one by one callback, which begins after a third of the run. Each run is a
process of one thread. Finished runs are kept in `cifar10_quantization.json`, so that the script may be stopped and
started again; the table, in `cifar10_quantization.md`, tells of what is there.

    python experiments/cifar10_quantization.py          from LIGHTNING_COMPRESS_DATA or ../shared/data
    python experiments/cifar10_quantization.py --quick  a few batches of noise, to see that it works

The test images are read once per run, with the epoch that has the smallest error on 5,000 training images held back;
of a quantized run only quantized epochs count. Nothing was searched for.
"""

from typing import Any

from cifar10_distillation import data, needed

from common.quantization import FLOAT, Experiment, Settings, main


def model(settings: Settings) -> Any:
    import torch

    from lightning_compress.recipes.cifar10 import ResNet

    network = ResNet(1 if settings.data == "quick" else 3, settings.learning_rate)
    return network.to(memory_format=torch.channels_last)  # a fifth less time on a CPU


def prepared(images: Any) -> Any:
    import torch

    from lightning_compress.recipes.cifar10 import MEAN, STANDARD_DEVIATION

    mean, deviation = (torch.tensor(one).reshape(1, 3, 1, 1) for one in (MEAN, STANDARD_DEVIATION))
    return (images.float() / 255 - mean) / deviation


def example() -> Any:
    import torch

    return torch.zeros(8, 3, 32, 32)


EXPERIMENT = Experiment(
    script=__file__,
    title="ResNet-20 on CIFAR-10, quantized while it trains",
    model=model,
    data=data,
    example=example,
    prepared=prepared,
    schemes={FLOAT: {}, "W8A8": {"weights": 8, "activations": 8}, "W4A4": {"weights": 4, "activations": 4}},
    words=(
        "The images were stored as JPEG, which loses a little: figures are not quite comparable with those on the "
        "original pixels. First and last layer have 8 bits, as in the paper of LSQ. So few epochs leave it far "
        "from what it reaches in 200; compared are equal epochs."
    ),
    defaults={"epochs": 4, "batch_size": 128, "learning_rate": 0.2},
    quick={"epochs": 3, "batches": 2, "batch_size": 16, "data": "quick"},
    needed=needed,
)

if __name__ == "__main__":
    main(EXPERIMENT)
