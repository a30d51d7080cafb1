"""Softened probabilities, and how far one distribution lies from another."""

import math

from torch import Tensor
from torch.nn import functional

from lightning_compress.core.precision import to_float32


def check_positive_temperature(temperature: float) -> None:
    """Refuse a temperature that softens nothing.

    Raises:
        ValueError: if it is not above 0 and finite.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is above 0, but is {temperature}. 1 leaves the probabilities as they are.")


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities over the last dimension, of logits divided by the temperature, in float32 or wider."""
    check_positive_temperature(temperature)
    return functional.log_softmax(to_float32(logits) / temperature, dim=-1)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(p || q)` over the last dimension, in nats, from log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
