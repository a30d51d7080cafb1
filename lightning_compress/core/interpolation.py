"""The way from an initial to a final value; `core.schedules` offers all it defines by name, so this stands apart."""


def interpolate(initial: float, final: float, share: float) -> float:
    """The value when `share` of the way is gone; a share above 1, which rounding can give, counts as 1.

    >>> interpolate(0.5, 0.9, share=0.5), interpolate(8, 4, share=1.0 + 1e-9)
    (0.7, 4.0)
    """
    return initial + (final - initial) * min(share, 1.0)
