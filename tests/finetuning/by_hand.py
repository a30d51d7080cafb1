"""The same phases written by hand: plain torch, no Lightning, nothing of ours."""

import torch
from torch import nn


def train(net, optimizer, loader, epochs, *, before=None, rates=None, schedule=None, by_epoch=None, accumulate=1):
    """Train as the classifier of `conftest` does.

    Args:
        before: called with the step, before its forward pass.
        rates: step -> learning rate of each group, instead of what is there; None leaves it.
        schedule, by_epoch: schedulers that are stepped after each step, after each epoch.
    """
    step = 0
    for _ in range(epochs):
        for batch, (x, y) in enumerate(loader):
            if before is not None:
                before(step)
            (nn.functional.cross_entropy(net(x), y) / accumulate).backward()
            if (batch + 1) % accumulate and batch + 1 != len(loader):
                continue
            given = [group["lr"] for group in optimizer.param_groups]
            for group, rate in zip(optimizer.param_groups, (rates(step, given) if rates else given), strict=True):
                group["lr"] = rate
            optimizer.step()
            for group, rate in zip(optimizer.param_groups, given, strict=True):
                group["lr"] = rate
            optimizer.zero_grad()
            step += 1
            if schedule is not None:
                schedule.step()
        if by_epoch is not None:
            by_epoch.step()
    return net


def equal(one, other):
    """Whether two modules have the same weights and statistics, to the last bit."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def normed():
    """A network with BatchNorms, equal each time if it is made in a seeded fork."""
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def noted(pl, note):
    """A callback that keeps what `note(trainer)` says after each batch."""

    class Note(pl.Callback):
        def __init__(self):
            self.by_batch = []

        def on_train_batch_end(self, trainer, *_):
            self.by_batch.append(note(trainer))

    return Note()
