"""Schedules that end before the run: found where torch itself, stepped so often, fails, rises again or stands still."""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from lightning_compress import FineTuning, Pruning
from lightning_compress.core.phases import Run
from lightning_compress.training.lr_schedule_checks import find_short_schedules, ticks_left


@dataclass
class Config:
    """What Lightning keeps of a schedule."""

    scheduler: Any = None
    interval: str = "step"
    frequency: int = 1
    reduce_on_plateau: bool = False


def falling(length, step):
    return max(0.0, (length - step) / length)


MAKERS = {
    "one_cycle": lambda optimizer, length: schedulers.OneCycleLR(optimizer, 0.1, total_steps=length),
    "cosine": schedulers.CosineAnnealingLR,
    "linear": lambda optimizer, length: schedulers.LambdaLR(optimizer, partial(falling, length)),
    "polynomial": lambda optimizer, length: schedulers.PolynomialLR(optimizer, length),
    "constant": lambda optimizer, length: schedulers.LambdaLR(optimizer, lambda step: 1.0),
    "steps": lambda optimizer, length: schedulers.StepLR(optimizer, length),
    "warm_up_then_cosine": lambda optimizer, length: schedulers.SequentialLR(
        optimizer,
        [schedulers.ConstantLR(optimizer), schedulers.CosineAnnealingLR(optimizer, length - 2)],
        milestones=[2],
    ),
    "chained": lambda optimizer, length: schedulers.ChainedScheduler(
        [schedulers.PolynomialLR(optimizer, length), schedulers.StepLR(optimizer, 2)], optimizer
    ),
}


def made(name, length):
    return MAKERS[name](torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1, momentum=0.9), length)


def played(name, length, steps):
    """What becomes of the run if torch is asked: it "stops", its rates rise, or are zero in the end; or None."""
    scheduler, rates = made(name, length), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler.step()
        except ValueError:
            return "stops"
    if "cosine" in name:  # which is zero only where it turns, and may end there
        rates = rates[2:] if name.startswith("warm_up") else rates
        return "rises" if rates[-1] > min(rates) + 1e-9 else None
    return "stands" if rates[-1] == 0 else None


@pytest.mark.parametrize("steps", [4, 5, 6, 7, 9])
@pytest.mark.parametrize("name", MAKERS)
def test_a_schedule_is_called_short_where_it_is(name, steps):
    found = find_short_schedules([Config(made(name, 5))], Run(epochs=None, max_steps=steps), 0, 0)
    words = {"stops": "stops the run with an error", "rises": "rises again", "stands": "is 0 from its step 5 on"}
    expected = played(name, 5, steps)
    assert len(found) == (expected is not None)
    assert all(words[expected] in one.words and one.stops == (expected == "stops") for one in found)


@pytest.mark.parametrize(
    ("config", "run", "done", "ticks"),
    [
        (Config(), Run(epochs=3, batches_per_epoch=8), (5, 0), 19),
        (Config(frequency=2), Run(epochs=3, batches_per_epoch=8), (0, 0), None),
        (Config(interval="epoch"), Run(epochs=3, batches_per_epoch=8), (8, 0), 2),  # saved within the first epoch's end
        (Config(interval="epoch", frequency=2), Run(epochs=7, batches_per_epoch=8), (8, 1), 3),
        (Config(interval="epoch"), Run(epochs=3, batches_per_epoch=8, max_steps=23), (0, 0), 2),
        (Config(interval="epoch"), Run(epochs=3), (0, 1), 2),
        (Config(), Run(epochs=3), (0, 0), None),
        (Config(), Run(epochs=3, batches_per_epoch=8, automatic=False), (0, 0), None),
        (Config(interval="epoch", reduce_on_plateau=True), Run(epochs=3), (0, 0), None),
    ],
)
def test_how_often_a_schedule_will_be_stepped(config, run, done, ticks):
    assert ticks_left(config, run, *done) == ticks


def test_what_remembers_its_calls_is_not_asked():
    class Counting:
        calls = 0

        def __call__(self, step):
            self.calls += 1
            return 0.0

    factor = Counting()
    scheduler = schedulers.LambdaLR(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1), factor)
    called = factor.calls
    assert find_short_schedules([Config(scheduler)], Run(epochs=None, max_steps=9), 0, 0) == []
    assert factor.calls == called


def scheduled(make_module, name, length):
    module = make_module()
    optimize = module.configure_optimizers

    def configure_optimizers():
        optimizer = optimize()
        config = {"scheduler": MAKERS[name](optimizer, length), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": config}

    module.configure_optimizers = configure_optimizers
    return module


def test_a_cycle_that_is_too_short_is_refused_before_the_first_step(pl, make_module, make_trainer, loader):
    make_trainer([Pruning(0.5)], max_epochs=1).fit(scheduled(make_module, "one_cycle", 8), loader)
    trainer = make_trainer([Pruning(0.5)], max_epochs=1)
    with pytest.raises(ValueError, match="total_steps=7, but is stepped 8 times in this run"):
        trainer.fit(scheduled(make_module, "one_cycle", 7), loader)
    assert trainer.global_step == 0
    early = pl.callbacks.EarlyStopping("train_loss", stopping_threshold=99.0, check_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match="total_steps=9, but is stepped 16 times"):
        make_trainer([FineTuning(freeze="net.0"), early], max_epochs=2).fit(
            scheduled(make_module, "one_cycle", 9), loader
        )


def test_a_cosine_that_is_too_short_is_said_unless_a_phase_has_rates_of_its_own(make_module, make_trainer, loader):
    with pytest.warns(UserWarning, match="T_max=4, but is stepped 8 times in this run"):
        make_trainer([Pruning(0.5)], max_epochs=1).fit(scheduled(make_module, "cosine", 4), loader)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*T_max")
        tuning = FineTuning(learning_rate=0.01, begin=4)
        make_trainer([tuning], max_epochs=1).fit(scheduled(make_module, "cosine", 4), loader)
