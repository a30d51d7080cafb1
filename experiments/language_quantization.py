"""A transformer that reads characters: in float32, with 8 bits, and with weights of 4 bits in groups of 32.

The quantized runs differ from the float32 one by one callback, which begins after a third of the run. Each run is a
process of one thread. Finished runs are kept in `language_quantization.json`, so that the script may be stopped and
started again; the table is in `language_quantization.md`.

    python experiments/language_quantization.py          the text comes with Python and differs between its versions
    python experiments/language_quantization.py --quick  a few batches, to see that it works
"""

from typing import Any

from common.quantization import FLOAT, Experiment, Settings, main

LENGTH, LAYERS = 128, 2
# The model adds the weight of `places` without calling the module, so that no hook sees it.
COMMON = {"ignore": ["places.*"]}
# No integer kernel takes groups, and a file without any integer kernel is refused.
EDGES = {"blocks.0.inputs": {"granularity": "channel"}, "head": {"granularity": "channel"}}


def model(settings: Settings) -> Any:
    from lightning_compress.recipes.characters import CharacterModel, python_topics

    return CharacterModel(len(set(python_topics())), LAYERS, length=LENGTH, learning_rate=settings.learning_rate)


def data(settings: Settings) -> Any:
    from lightning_compress.recipes.characters import Characters

    return Characters(batch_size=settings.batch_size, length=LENGTH)


def example() -> Any:
    import torch

    return torch.zeros(4, LENGTH, dtype=torch.long)


def needed() -> str | None:
    return None


EXPERIMENT = Experiment(
    script=__file__,
    title="A transformer for characters, quantized while it trains",
    model=model,
    data=data,
    example=example,
    schemes={
        FLOAT: {},
        "W8A8": {"weights": 8, "activations": 8, **COMMON},
        "W4A8, groups of 32": {
            "weights": 4,
            "activations": 8,
            "granularity": "group 32",
            "overrides": EDGES,
            **COMMON,
        },
    },
    words=(
        "Two layers of width 128 (attention, LayerNorm, GELU, embeddings), 100 steps to an epoch; text of Python's own "
        "help, split by position. First and last layer have 8 bits; the embedding of characters is quantized too."
    ),
    defaults={"epochs": 5, "batch_size": 32, "learning_rate": 0.003},
    quick={"epochs": 3, "batches": 3, "batch_size": 4},
    needed=needed,
    metric="bits",
    factor=1.0,
    unit="bits per character",
    digits=3,
)

if __name__ == "__main__":
    main(EXPERIMENT)
