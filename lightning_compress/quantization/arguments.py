"""What does not go together: arguments of the callback, and it with other callbacks."""

from collections.abc import Iterable
from typing import Any

from lightning_compress.quantization.layers import Layer
from lightning_compress.quantization.plan import Request


def check_strength(damping: float) -> float:
    """Return `damping`, a number of 0 or more.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(damping, bool) or not isinstance(damping, int | float) or not damping >= 0:
        raise ValueError(f"damping is a strength of 0 or more, but is {damping!r}. 0.001 is a place to begin.")
    return damping


def check_alone(**asked: Any) -> None:
    """Refuse what would change a training that is to be left as it is.

    Raises:
        ValueError: if any of these is asked for.
    """
    if changes := [f"{name}={value!r}" for name, value in asked.items() if value]:
        raise ValueError(
            f"calibrate_only=True leaves the training as it is, but {', '.join(changes)} would change it. Leave out "
            f"one or the other."
        )


def refuse_masks_on_binary(name: str, layers: list[Layer], request: Request, callbacks: Iterable[Any]) -> None:
    """Refuse to make binary what another callback prunes.

    Raises:
        ValueError: if a weight is on both lists.
    """
    plans = request.plan(layers)
    forms = {held.name: plans[layer.name].weights for layer in layers for held in layer.weights}
    binary = {one for one, form in forms.items() if form is not None and form.name == "binary"}
    for other in callbacks:
        masked = {one.name for one in other.selection.chosen} if hasattr(other, "masks") and other.selection else set()
        if both := sorted(binary & masked):
            raise ValueError(
                f"'{other.name}' prunes {', '.join(both)}, but binary weights have no zero: pruned ones would come "
                f"back as +1 in '{name}'. Write weights='ternary' there, or ignore these in one of the two callbacks."
            )
