"""Batches of a loader, and how a model is called with one."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from inspect import signature
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.quantization.ptq.progress import DelayedProgress

Forward = Callable[[nn.Module, Any], Any]
Note = Callable[[tuple[Any, ...], dict[str, Any], Any], None]


class StopForward(Exception):  # noqa: N818 (nothing went wrong)
    """Raised by who has seen what it wanted of a model's forward."""


class CalibrationBatches:
    """The batches that a model is watched with.

    Args:
        loader: any iterable of batches.
        limit: how many of them; None: all.
        forward: calls a model with a batch; None: `call_on_device`.
        kept: whether they are gone through more than once, and so stay in memory.
        progress: what shows how far a pass has come.

    Raises:
        ValueError: if there is none, or the loader is no such iterable.
    """

    def __init__(
        self, loader: Iterable[Any], limit: int | None, forward: Forward | None, kept: bool, progress: DelayedProgress
    ) -> None:
        _check(loader, limit)
        self.forward, self.progress = forward or call_on_device, progress
        remaining = islice(loader, limit)
        self.first = next(remaining, None)
        if self.first is None:
            raise ValueError(
                "There is no calibration data: the loader gave no batch. A few hundred samples are enough."
            )
        all_ = chain([self.first], remaining)
        self.batches = list(all_) if kept else all_
        self.count = len(self.batches) if isinstance(self.batches, list) else _length(loader, limit)

    def call(self, model: nn.Module, batch: Any) -> Any:
        """What the model gives for a batch, which stays as it is."""
        return self.forward(model, _on_device_of(model, batch))

    def run(self, model: nn.Module, what: str, end_batch: Callable[[], None] | None = None) -> None:
        """Call the model with all batches, each until somebody has seen enough; after each call `end_batch`."""
        for batch in self.progress.track(self.batches, what, self.count):
            with suppress(StopForward):
                self.call(model, batch)
            if end_batch is not None:
                end_batch()


def call_on_device(model: nn.Module, batch: Any) -> Any:
    """Give a model the input of a batch: the first part of a tuple or list, keywords of a dict, or all of it.

    Raises:
        ValueError: if the model has no forward, or one that does not take these keywords.
    """
    given = batch[0] if isinstance(batch, tuple | list) else batch
    try:
        if not isinstance(given, Mapping):
            return model(given)
        _check_keywords(model, given)
        return model(**given)
    except NotImplementedError as error:
        if "forward" not in str(error):
            raise
        raise ValueError(
            f"{type(model).__name__} has no forward to call with a batch. Say how it is called: "
            f"forward=lambda model, batch: model.net(batch[0])."
        ) from error


@contextmanager
def recorded_calls(module: nn.Module, note: Note) -> Iterator[None]:
    """Within the context tell `note` of each call: arguments as the layer got them, output before anybody else."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        note(args, kwargs, output)

    handle = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _check(loader: Any, limit: int | None) -> None:
    if isinstance(loader, Tensor | Mapping | str) or not isinstance(loader, Iterable):
        raise ValueError(
            f"loader is an iterable of batches, such as a DataLoader or a list, but is a {type(loader).__name__}. For "
            f"one batch write [batch]; of a data module give its train_dataloader()."
        )
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"batches is how many of them to watch, at least 1, or None for all, but is {limit!r}.")


def _check_keywords(model: nn.Module, batch: Mapping[str, Any]) -> None:
    try:
        signature(model.forward).bind(**batch)
    except TypeError as error:
        raise ValueError(
            f"The keys of the batch, {', '.join(map(str, batch))}, are not what the forward of {type(model).__name__} "
            f"takes: {error}. Say how it is called: forward=lambda model, batch: model(batch['image'])."
        ) from error


def _length(loader: Any, limit: int | None) -> int | None:
    try:
        count = len(loader)
    except TypeError:
        return limit
    return count if limit is None else min(count, limit)


def _on_device_of(model: nn.Module, batch: Any) -> Any:
    device = next(model.parameters()).device
    return torch.utils._pytree.tree_map(lambda one: _moved(one, device), batch)


def _moved(one: Any, device: torch.device) -> Any:
    if isinstance(one, Tensor):
        # A copy, since some models write into what they are given.
        return one.to(device, copy=True)
    # Batches of tokenizers are mappings of a kind of their own, and move themselves.
    return one.to(device) if isinstance(one, Mapping) and hasattr(one, "to") else one
