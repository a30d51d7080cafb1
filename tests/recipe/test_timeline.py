"""When everything happens, computed by hand; and what is said where it cannot be known."""

from types import SimpleNamespace

import pytest

from lightning_compress import ChannelPruning, Pruning, QuantizationAwareTraining, Recipe
from lightning_compress.core.phases import Run
from lightning_compress.recipe.timeline import run_from_length, timeline_rows


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("callbacks:\n- Pruning: {schedule: linear, begin: 20%, end: 60%, every: 20%}\n- ModelCheckpoint\n")
    return path


def pruning(**arguments):
    return Pruning(**{"schedule": "linear", "begin": "20%", "end": "60%", "every": "20%", **arguments})


def test_moments_are_steps_where_the_length_is_known():
    assert timeline_rows([pruning()], Run(None, 1000)) == [
        ("step 200", "pruning", "sparsity 0.00%"),
        ("step 400", "pruning", "sparsity 45.00%"),
        ("step 600", "pruning", "sparsity 90.00%"),
        ("step 1,000", "", "the run ends"),
    ]
    assert timeline_rows([pruning()], Run(10, None, 7, accumulate=2))[0][0] == "step 8"


def test_moments_are_epochs_where_only_these_are_known():
    assert [when for when, _, _ in timeline_rows([pruning()], Run(10))] == ["epoch 2", "epoch 4", "epoch 6"]


def test_moments_of_all_callbacks_are_in_the_order_of_time_and_may_lie_beyond_the_end():
    late = pruning(name="late", begin=300, end=5000, every=4700)
    table = timeline_rows([late, pruning()], Run(None, 1000))
    assert [when for when, _, _ in table] == [
        "step 200",
        "step 300",
        "step 400",
        "step 600",
        "step 1,000",
        "step 5,000",
    ]
    assert [who for _, who, _ in table] == ["pruning", "late", "pruning", "pruning", "", "late"]


def test_of_many_moments_the_first_and_the_last_are_shown():
    table = timeline_rows([pruning(every=1)], Run(None, 1000))
    assert len(table) == 13
    assert "(then 389 more)" in table[5][2]
    assert (table[0][0], table[-2][0]) == ("step 200", "step 600")


def test_what_cannot_be_known_is_said_in_words_at_the_end():
    *_, (when, who, what) = timeline_rows(
        [pruning(begin="1 epochs", end="3 epochs"), pruning(name="other")], Run(None, 100)
    )
    assert (when, who) == ("?", "pruning")
    assert "the training loader's length is unknown" in what


@pytest.mark.parametrize(
    ("begin", "words"),
    [("60%", None), ("59%", "'quantization' needs shapes that stay from begin='59%' on"), (100, "would do nothing")],
)
def test_what_a_trainer_would_refuse_is_said_where_steps_are_known(begin, words):
    callbacks = [QuantizationAwareTraining(begin=begin, end=200), ChannelPruning(sparsity=0.5, end="60%")]
    refused = [what for when, _, what in timeline_rows(callbacks, Run(None, 100)) if when == "refused"]
    assert len(refused) == (words is not None)
    assert all(words in what for what in refused)


def test_the_table_is_printed_and_returned(recipe, capsys):
    text = Recipe.load(recipe).timeline(1000)
    printed = capsys.readouterr().out
    for words in ("step 200", "sparsity 45.00%", "A run of 1,000 optimizer steps.", "ModelCheckpoint."):
        assert words in text
        assert words in printed


def test_a_trainer_tells_the_length(pl, recipe, make_trainer):
    load = Recipe.load(recipe)
    assert "step 60 " in load.timeline(make_trainer(max_epochs=10, limit_train_batches=10))
    assert "step 30 " in load.timeline(make_trainer(max_epochs=10, limit_train_batches=10, accumulate_grad_batches=2))
    assert "step 12 " in load.timeline(make_trainer(max_epochs=-1, max_steps=20))
    by_epoch = load.timeline(make_trainer(max_epochs=10))
    assert "epoch 6 " in by_epoch
    assert "cannot be known without the data" in " ".join(by_epoch.split())
    assert run_from_length(make_trainer()).epochs == 1000
    assert run_from_length(make_trainer(max_epochs=-1)).epochs is None
    timed = load.timeline(make_trainer(max_time="00:00:01:00"))
    assert "which ends by max_time" in timed
    assert "only max_time ends this run" in " ".join(timed.split())


def test_what_is_no_trainer_tells_no_length():
    with pytest.raises(ValueError, match="steps above 0 or a Trainer, but is namespace"):
        run_from_length(SimpleNamespace(max_epochs=3))


def test_the_recipes_own_trainer_section_tells_the_length(recipe):
    overrides = ["trainer.max_epochs=10", "trainer.limit_train_batches=10"]
    assert "step 60 " in Recipe.load(recipe, overrides=overrides).timeline()
    with pytest.raises(ValueError, match="does not say how long the run is"):
        Recipe.load(recipe).timeline()


@pytest.mark.parametrize("length", [0, -3, True, 1.5, "1000"])
def test_a_length_that_is_none_is_refused(recipe, length):
    with pytest.raises(ValueError, match="number of optimizer steps above 0 or a Trainer, but is"):
        Recipe.load(recipe).timeline(length)
