import math

import pytest

from lightning_compress.core.phases import PhaseWindow, Run, check_order, parse_duration, resolve_window

TEN_EPOCHS = Run(epochs=10, batches_per_epoch=100)


@pytest.mark.parametrize(
    ("begin", "end", "every", "run", "expected"),
    [
        ("20%", "50%", "1%", TEN_EPOCHS, PhaseWindow("steps", 200, 500, 10)),
        (0.2, 0.5, 0.01, TEN_EPOCHS, PhaseWindow("steps", 200, 500, 10)),
        ("3 epochs", "500 steps", 25, TEN_EPOCHS, PhaseWindow("steps", 300, 500, 25)),
        ("0.5 epochs", "1 epoch", "1 step", TEN_EPOCHS, PhaseWindow("steps", 50, 100, 1)),
        # 10 batches, 4 accumulated: steps after batches 4, 8 and 10 of each epoch.
        ("50%", "100%", 1, Run(epochs=4, batches_per_epoch=10, accumulate=4), PhaseWindow("steps", 6, 12, 1)),
        ("1 epochs", "2 epochs", 1, Run(epochs=4, batches_per_epoch=10, accumulate=4), PhaseWindow("steps", 3, 6, 1)),
        # max_steps ends before, or after, max_epochs.
        ("10%", "100%", 1, Run(epochs=10, batches_per_epoch=100, max_steps=500), PhaseWindow("steps", 50, 500, 1)),
        ("10%", "100%", 1, Run(epochs=2, batches_per_epoch=100, max_steps=500), PhaseWindow("steps", 20, 200, 1)),
        # Endless epochs, a number of steps.
        ("10%", "100%", 1, Run(epochs=None, batches_per_epoch=100, max_steps=500), PhaseWindow("steps", 50, 500, 1)),
        ("10%", "100%", 1, Run(epochs=None, batches_per_epoch=None, max_steps=500), PhaseWindow("steps", 50, 500, 1)),
        ("100 steps", "2 epochs", 1, Run(epochs=None, batches_per_epoch=100), PhaseWindow("steps", 100, 200, 1)),
        # Loaders of unknown length: whole epochs.
        ("20%", "70%", "1%", Run(epochs=10), PhaseWindow("epochs", 2, 7, 1)),
        ("1 epochs", "70%", "2 epochs", Run(epochs=10), PhaseWindow("epochs", 1, 7, 2)),
        ("0%", "70%", "1%", Run(epochs=3), PhaseWindow("epochs", 0, 2, 1)),
        # Manual optimization: batches, unless all is written in steps.
        (
            "20%",
            "50%",
            "1%",
            Run(epochs=10, batches_per_epoch=100, automatic=False),
            PhaseWindow("batches", 200, 500, 10),
        ),
        (100, 200, 10, Run(epochs=10, batches_per_epoch=100, automatic=False), PhaseWindow("steps", 100, 200, 10)),
        (
            0,
            "1 epochs",
            "1 epochs",
            Run(epochs=10, batches_per_epoch=7, automatic=False),
            PhaseWindow("batches", 0, 7, 7),
        ),
        ("10%", "50%", "1%", Run(epochs=None, max_steps=1000, automatic=False), PhaseWindow("steps", 100, 500, 10)),
        # The shortest runs still have a phase.
        ("10%", "70%", "1%", Run(epochs=1, batches_per_epoch=1), PhaseWindow("steps", 0, 1, 1)),
        ("10%", "70%", "1%", Run(epochs=1, batches_per_epoch=2), PhaseWindow("steps", 0, 2, 1)),
        ("10%", "70%", "1%", Run(epochs=3, batches_per_epoch=1), PhaseWindow("steps", 0, 3, 1)),
        # 0.7 * 10 is 7.000000000000001 nowhere that matters.
        ("0%", "70%", "1%", Run(epochs=1, batches_per_epoch=10), PhaseWindow("steps", 0, 7, 1)),
        # To the end of a run whose end is not known.
        ("0%", "100%", 5, Run(epochs=None), PhaseWindow("steps", 0, math.inf, 5)),
    ],
)
def test_resolves_to_the_clock_of_the_run(begin, end, every, run, expected):
    assert resolve_window(begin, end, every, run) == expected


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (Run(epochs=None, batches_per_epoch=100), "this run has no end"),
        (Run(epochs=None, batches_per_epoch=100, max_time=True), "only max_time ends this run"),
        (Run(epochs=10, batches_per_epoch=100, max_steps=50, automatic=False), "under manual optimization"),
    ],
)
def test_says_why_a_fraction_cannot_be_known(run, message):
    with pytest.raises(ValueError, match=message):
        resolve_window("10%", "70%", "1%", run)


def test_says_that_a_loader_of_unknown_length_cannot_mix_steps_and_epochs():
    with pytest.raises(ValueError, match="loader's length is unknown"):
        resolve_window("1 epochs", "500 steps", 1, Run(epochs=10))


def test_says_that_one_epoch_of_unknown_length_has_no_room():
    with pytest.raises(ValueError, match="no room in 1 epochs of unknown length"):
        resolve_window("10%", "70%", "1%", Run(epochs=1))


@pytest.mark.parametrize(("begin", "moment"), [(100, 100), ("3 epochs", 3), ("50%", 0)])
def test_a_trial_of_one_batch_may_end_before_a_phase_begins(begin, moment):
    run = Run(epochs=1, batches_per_epoch=1, dry_run=True)
    assert resolve_window(begin, "100%", "1%", run) == PhaseWindow("steps", moment, moment + 1, 1)
    assert resolve_window("10%", "70%", "1%", Run(epochs=1, dry_run=True)) == PhaseWindow("epochs", 0, 1, 1)


def test_refuses_mixed_units_in_the_wrong_order_once_they_can_be_compared():
    with pytest.raises(ValueError, match="begin='5 epochs' is moment 500 and end='300 steps' is moment 300"):
        resolve_window("5 epochs", "300 steps", 1, TEN_EPOCHS)


@pytest.mark.parametrize(
    "wrong", ["20", "20 percent", "", "-3 steps", "x steps", None, True, -1, 1.5, float("nan"), "120%"]
)
def test_refuses_what_is_no_duration(wrong):
    with pytest.raises(ValueError, match="duration|whole run"):
        parse_duration(wrong)


@pytest.mark.parametrize(("begin", "end"), [("50%", "20%"), (0.5, 0.5), ("3 epochs", "3 epochs"), (10, 5), ("1%", 0)])
def test_refuses_a_phase_without_length(begin, end):
    with pytest.raises(ValueError, match="is not before end"):
        check_order(begin, end)


def test_refuses_a_pace_of_zero():
    with pytest.raises(ValueError, match="every='0 steps' never goes on"):
        check_order("10%", "70%", "0 steps")


def test_moments_are_those_at_which_moment_changes():
    window = PhaseWindow("steps", begin=3, end=17, every=5)
    changes = [now for now in range(30) if window.last_time(now) not in (None, window.last_time(now - 1))]
    assert window.times() == changes == [3, 8, 13, 17]


def test_progress_is_linear_between_begin_and_end():
    window = PhaseWindow("steps", begin=10, end=20)
    assert [window.progress(now) for now in (0, 10, 15, 20, 99)] == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_a_phase_without_a_pace_is_counted_as_its_begin_and_end_are():
    by_hand = Run(epochs=4, batches_per_epoch=10, automatic=False)
    assert resolve_window("25%", "50%", None, by_hand) == PhaseWindow("batches", 10, 20)
    assert resolve_window(10, 20, None, by_hand) == PhaseWindow("steps", 10, 20)
    with pytest.raises(ValueError, match=r"begin=10, end='50%' cannot be resolved"):
        resolve_window(10, "50%", None, by_hand)
