"""What flows where over all calls of a module: where each call goes the same way, they are looked at as one.

A track is a value for each call, in their order. A network that is called once in a step has tracks of one value; one
that is called for each of two views, or a head for each of five levels, has tracks of two or five.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_compress.nn.dataflow import Dataflow, Operation

Track: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class AlignedOperation:
    """The same operation of each call."""

    function: Callable[..., Any]
    module: str | None
    inputs: tuple[Track, ...]
    outputs: tuple[Track, ...]


class AlignedCalls:
    """The tracks of a flow."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow

    def inputs(self, module: str) -> tuple[Track, ...]:
        """What a module was given, by position, as far as all of its calls have as many tensors."""
        return tuple(zip(*self.flow.inputs[module], strict=False))

    def outputs(self, module: str) -> Track | None:
        """What a module returned, if that was a single tensor each time."""
        values = self.flow.outputs.get(module, [])
        return None if not values or None in values else tuple(value for value in values if value is not None)

    def consumers_of(self, track: Track) -> list[AlignedOperation] | None:
        """The operations that took a track; None if the calls differ in them."""
        by_call = [self.flow.consumers_of(value) for value in track]
        if len({len(uses) for uses in by_call}) != 1:
            return None
        found = [_as_one(operations) for operations in zip(*by_call, strict=True)]
        known = [use for use in found if use is not None]
        return known if len(known) == len(found) else None

    def producer(self, track: Track) -> AlignedOperation | None:
        """The operation that made a track, if it is the same in each call."""
        made = [self.flow.producer[value] for value in track if value in self.flow.producer]
        return _as_one(tuple(made)) if len(made) == len(track) else None

    def consumers(self, track: Track) -> list[str | None]:
        """The modules that took any of its values."""
        return [use.module for value in track for use in self.flow.consumers_of(value)]

    def boundary(self, track: Track) -> str | None:
        """The innermost module that returned this, at each of its calls, and does not use it itself."""
        returned = [name for name in self.flow.boundaries.get(track[0], ()) if name and self.outputs(name) == track]
        users = self.consumers(track)
        return next((name for name in returned if not any(is_submodule(user, name) for user in users)), None)

    def descendants(self, tracks: Iterable[Track]) -> Iterator[AlignedOperation]:
        """The operations that took these tracks, or what was made of them, as far as all calls have the same."""
        waiting, seen = deque(tracks), set[Track]()
        while waiting:
            for use in self.consumers_of(waiting.popleft()) or ():
                if use.outputs and use.outputs[0] not in seen:
                    yield use
                    seen.update(use.outputs)
                    waiting.extend(use.outputs)

    def argument_positions(self, track: Track) -> list[tuple[str, int]]:
        """The modules that were given this as an argument, at each of their calls, and the position; not the whole."""
        found = []
        for name, calls in self.flow.inputs.items():
            given = self.inputs(name)[: self.flow.num_positional[name]] if name and len(calls) == len(track) else ()
            found += [(name, given.index(track))] if track in given else []
        return found


def is_submodule(module: str | None, name: str) -> bool:
    """Whether a module is another one, or a part of it."""
    return module is not None and f"{module}.".startswith(f"{name}.")


def _as_one(operations: tuple[Operation, ...]) -> AlignedOperation | None:
    first = operations[0]
    same = {(one.function, one.module, len(one.inputs), len(one.outputs)) for one in operations}
    if len(same) > 1:
        return None
    inputs = tuple(zip(*(one.inputs for one in operations), strict=True))
    return AlignedOperation(
        first.function, first.module, inputs, tuple(zip(*(one.outputs for one in operations), strict=True))
    )
