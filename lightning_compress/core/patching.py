"""Change one method of one object, and put it back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any


@contextmanager
def wrapped_method(owner: object, name: str, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Within the context, `owner.name(...)` calls `wrapper(original, ...)`; the class stays as it is.

    Several wrappers of one method nest, the newest outermost, and may end in any order.
    """
    own: Any = vars(owner).get(name)
    # Of our own making, not a function of somebody's that took our attributes along by functools.wraps.
    method: Any = own if getattr(own, "wrapper", None) is own is not None else _with_wrappers(getattr(owner, name), own)
    setattr(owner, name, method)
    layer = partial(wrapper)  # equal to no other layer, even of the same wrapper
    method.wrappers.append(layer)
    try:
        yield
    finally:
        method.wrappers.remove(layer)
        if not method.wrappers:
            _put_back(owner, name, method)


def _with_wrappers(original: Callable[..., Any], own: Callable[..., Any] | None) -> Any:
    wrappers: list[Callable[..., Any]] = []

    @wraps(original)
    def call_through(*args: Any, **kwargs: Any) -> Any:
        call = original
        for wrapper in wrappers:
            call = partial(wrapper, call)
        return call(*args, **kwargs)

    method: Any = call_through
    method.wrappers, method.own, method.wrapper = wrappers, own, method
    return method


def _put_back(owner: object, name: str, method: Any) -> None:
    own = method.own
    if vars(owner).get(name) is not method:
        return  # somebody has replaced it meanwhile; it is theirs now
    if own is None:
        delattr(owner, name)
    else:
        setattr(owner, name, own)
