"""Monitors that must not judge a half-compressed model: which epoch is best, when to stop early."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from lightning_compress.core.patching import wrapped_method


def reset_monitors(callbacks: Iterable[Any]) -> list[str]:
    """Let every `ModelCheckpoint(monitor=...)` and `EarlyStopping` begin its comparison anew.

    What a checkpoint callback has saved stays until a new best one takes its place, but counts as the worst.

    Returns:
        The monitored names.
    """
    monitored = []
    for callback in callbacks:
        if _is_checkpoint(callback):
            worst = torch.tensor(float("inf") if callback.mode == "min" else float("-inf"))
            callback.best_k_models = dict.fromkeys(callback.best_k_models, worst)
            callback.kth_value = worst
            callback.best_model_score = None if callback.best_model_score is None else worst
            monitored.append(callback.monitor)
        elif _is_early_stopping(callback):
            callback.wait_count = 0
            callback.best_score = torch.tensor(float("inf") if callback.mode == "min" else float("-inf"))
            monitored.append(callback.monitor)
    return monitored


@contextmanager
def paused_early_stopping(callbacks: Iterable[Any], reached: Callable[[], bool]) -> Iterator[None]:
    """Within the context, `EarlyStopping` neither counts nor stops until `reached()`."""

    def check(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        if reached():
            original(*args, **kwargs)

    with ExitStack() as stack:
        for callback in filter(_is_early_stopping, callbacks):
            for hook in ("on_validation_end", "on_train_epoch_end"):
                stack.enter_context(wrapped_method(callback, hook, check))
        yield


def _is_checkpoint(callback: Any) -> bool:
    return hasattr(callback, "best_k_models") and getattr(callback, "monitor", None) is not None


def _is_early_stopping(callback: Any) -> bool:
    return hasattr(callback, "wait_count") and hasattr(callback, "patience") and hasattr(callback, "best_score")
