"""Distillation written out by hand, and what it is compared on."""

import torch
from torch import nn
from torch.nn import functional as F

from lightning_compress import Distillation

ALPHA, TEMPERATURE = 0.7, 3.0


def network(width=16, seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))


def by_hand(student, teacher, temperature=TEMPERATURE):
    """Hinton's second term, written out."""
    p = F.log_softmax(teacher.float() / temperature, -1)
    q = F.log_softmax(student.float() / temperature, -1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True) * temperature**2


def weights(module):
    return [value.detach().clone() for value in module.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def close(one, other):
    """Equal but for the order in which gradients are added up."""
    return all(torch.allclose(a, b, atol=1e-6, rtol=1e-5) for a, b in zip(weights(one), weights(other), strict=True))


def task(logits, batch):
    return F.cross_entropy(logits, batch[1])


def plain(self, batch):
    return task(self.net(batch[0]), batch)


def with_teacher(teacher, wrap=lambda loss: loss):
    def step(self, batch):
        logits = self.net(batch[0])
        with torch.no_grad():
            answer = teacher(batch[0])
        return wrap((1 - ALPHA) * task(logits, batch) + ALPHA * by_hand(logits, answer))

    return step


def distillation(teacher, **arguments):
    return Distillation(teacher, **{"alpha": ALPHA, "temperature": TEMPERATURE, **arguments})
