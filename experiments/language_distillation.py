"""A language model of characters teaches one of half its layers: token probabilities, and hidden states too.

Every arm has six trials, two learning rates times three values of its own setting, judged by validation on a seed that
is not among the final ones. Finished runs are kept in `language_distillation.json`, so that the script may be stopped
and started again; the tables are in `language_distillation.md`. The teacher lies beside them, and is trained again if
it is not there.

    python experiments/language_distillation.py          the text comes with Python and differs between its versions
    python experiments/language_distillation.py --quick  a few batches, to see that it works
"""

import sys
from functools import cache
from itertools import product
from typing import Any

from common.distillation import ALONE, Candidate, Experiment, Settings, main

LEARNING_RATES = (0.003, 0.006)
TEACHINGS = ((1.0, 0.5), (2.0, 0.5), (2.0, 0.9))


@cache
def vocabulary() -> int:
    from lightning_compress.recipes.characters import python_topics

    return len(set(python_topics()))


def data(settings: Settings) -> Any:
    from lightning_compress.recipes.characters import Characters

    return Characters(batch_size=settings.batch_size)


def taught(**also: Any) -> list[Candidate]:
    return [
        Candidate({"learning_rate": rate}, {"temperature": temperature, "alpha": alpha, "losses": losses(**also)})
        for rate, (temperature, alpha) in product(LEARNING_RATES, TEACHINGS)
    ]


def losses(**layers: Any) -> Any:
    places = {place.replace("_to_", " -> ").replace("blocks", "blocks."): loss for place, loss in layers.items()}
    return {"output": "token_kl_divergence", **places} if places else "token_kl_divergence"


LANGUAGE = Experiment(
    task="language",
    title="Two layers from four",
    about=(
        "The text is what `help` says of Python's topics, in the Python named below (another text in each version), "
        "split by position: 90 % to train on, 5 % to choose by, 5 % to test. Samples of 128 characters, where no "
        "character before a sample is known; width 128 in teacher and student, an epoch is 100 steps. AdamW, "
        "one-cycle. The teacher was trained once, with dropout 0.1, and chosen by validation as the students are."
    ),
    student="lightning_compress.recipes.characters.CharacterModel",
    teacher="lightning_compress.recipes.characters.CharacterModel",
    data=data,
    epochs=20,
    teacher_epochs=25,
    batch_size=64,
    metric="bits",
    unit="bits per character",
    scale=1.0,
    fixed={"vocabulary": vocabulary(), "layers": 2},
    teaching={"vocabulary": vocabulary(), "layers": 4, "learning_rate": 0.003},
    seeds=(0, 1, 2, 3, 4),
    trial_seeds=(100,),
    arms={
        ALONE: [
            Candidate({"learning_rate": rate, "dropout": dropout})
            for rate, dropout in product(LEARNING_RATES, (0.0, 0.05, 0.1))
        ],
        "token soft targets": taught(),
        "token soft targets and hidden states": taught(blocks1_to_blocks3={"loss": "hint", "weight": 0.1}),
    },
)
NOTES = """\
p is that of a two-sided paired t-test, without correction for several arms. The test part is the end of the text, some
thousand characters of a few topics: the differences hold for these, and the bits themselves depend on the split. The
distilled students have dropout 0.1, which was not tuned for them. The teacher's settings were not tuned, and it is no
better than the student that learns alone: what the student gains from it is not that it comes near a better model. The
higher learning rate was chosen in every arm, so that a still higher one may be better yet.
"""

if __name__ == "__main__":
    sys.exit(main(__file__, __doc__ or "", [LANGUAGE], lambda: None, NOTES))
