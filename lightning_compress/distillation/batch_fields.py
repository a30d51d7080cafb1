"""From a module's output, or a batch, to the tensors that losses compare."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_compress.distillation.losses.token_mask import next_token_mask

Key = str | int | Callable[[Any], Any]

OUTPUT_NAMES = ("logits", "out", "output")
TARGET_NAMES = ("labels", "label", "targets", "target", "y")
IGNORED = -100


def select_tensor(output: Any, key: Key | None = None) -> Tensor:
    """The tensor that a module's output is about: itself, its `logits`, or the first one in a sequence.

    Args:
        output: a tensor, a sequence, a mapping, or an object with attributes such as Hugging Face's.
        key: which part it is, a name, a place or a function of the output; None looks for it.

    Raises:
        ValueError: if there is none.
    """
    found = _first(output) if key is None else _picked(output, key)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"An output of type {type(output).__name__}{_parts(output)} has no tensor "
            f"{'that can be taken for its logits' if key is None else f'at {key!r}'}. Say which one it is: "
            f"output='logits', output=0, or a function of the output."
        )
    return found


def select_target(batch: Any, key: Key | None = None) -> Tensor | None:
    """What a batch says is to be predicted: `batch[1]`, or its `labels` and the like; None if there is none."""
    if key is not None:
        found = _picked(batch, key)
    elif isinstance(batch, Mapping):
        found = next((batch[name] for name in TARGET_NAMES if name in batch), None)
    elif isinstance(batch, list | tuple):
        found = batch[1] if len(batch) > 1 else None
    else:
        found = next((getattr(batch, name) for name in TARGET_NAMES if hasattr(batch, name)), None)
    return found if isinstance(found, Tensor) else None


def select_mask(output: Any, target: Tensor | None) -> Tensor | None:
    """Which tokens count: those with a label other than -100.

    An output with `.logits` is Hugging Face's, whose labels are not shifted: the logits at a position predict the label
    after it. Otherwise the labels are taken to lie under the logits that predict them.
    """
    if target is None or target.ndim != 2 or target.is_floating_point():
        return None
    return next_token_mask(target, IGNORED) if hasattr(output, "logits") else target != IGNORED


def detach_tensors(value: Any) -> Any:
    """The same without gradients, at any depth of sequences and dicts."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(detach_tensors(one) for one in value)
    if isinstance(value, dict) and type(value) is dict:
        return {key: detach_tensors(one) for key, one in value.items()}
    return value


def _first(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return next((output[name] for name in OUTPUT_NAMES if name in output), None)
    if isinstance(output, list | tuple) and not hasattr(output, "logits"):
        return next((one for one in output if isinstance(one, Tensor)), None)
    return next((getattr(output, name) for name in OUTPUT_NAMES if hasattr(output, name)), None)


def _picked(value: Any, key: Key) -> Any:
    if callable(key):
        return key(value)
    try:
        return value[key]
    except (KeyError, IndexError, TypeError):
        return getattr(value, key, None) if isinstance(key, str) else None


def _parts(output: Any) -> str:
    if isinstance(output, Mapping):
        return f" with keys {', '.join(map(str, output))}"
    if isinstance(output, list | tuple):
        return f" of {', '.join(type(one).__name__ for one in output)}"
    return ""
