"""Numbers as a person reads them."""

from collections.abc import Sequence


def bytes_text(size_bytes: int) -> str:
    """Decimal units.

    >>> bytes_text(999), bytes_text(1_724_320), bytes_text(44_000)
    ('999 B', '1.72 MB', '44.0 kB')
    """
    return _scaled(size_bytes, ("B", "kB", "MB", "GB", "TB"))


def count_text(count: int) -> str:
    """In full.

    >>> count_text(431_080)
    '431,080'
    """
    return f"{count:,}"


def short_count_text(count: int) -> str:
    """To three digits.

    >>> short_count_text(950), short_count_text(431_080), short_count_text(2_293_000)
    ('950', '431 k', '2.29 M')
    """
    return _scaled(count, ("", "k", "M", "G", "T")).rstrip()


def percent_text(fraction: float) -> str:
    """Never rounds up to a whole, so that 100 % means all.

    >>> percent_text(0.9), percent_text(0.99999), percent_text(1.0), percent_text(0.0)
    ('90.00 %', '99.99 %', '100 %', '0 %')
    """
    if fraction in (0.0, 1.0):
        return f"{fraction * 100:.0f} %"
    return f"{int(fraction * 10_000 + 1e-6) / 100:.2f} %"


def milliseconds_text(value_ms: float) -> str:
    """To three digits.

    >>> milliseconds_text(0.1234), milliseconds_text(12.345)
    ('0.123 ms', '12.3 ms')
    """
    return f"{three_digits(value_ms)} ms"


def ratio_text(before: float, after: float) -> str:
    """How a value changed, as a factor.

    >>> ratio_text(1720, 44), ratio_text(1.0, 2.0), ratio_text(3, 3)
    ('39.1x smaller', '2.00x larger', 'unchanged')
    """
    if before == after or not before or not after:
        return "unchanged" if before == after else ""
    larger, smaller = max(before, after), min(before, after)
    return f"{three_digits(larger / smaller)}x {'smaller' if after < before else 'larger'}"


def shape_text(shape: Sequence[int]) -> str:
    """Dimensions in order.

    >>> shape_text((50, 20, 5, 5))
    '50 x 20 x 5 x 5'
    """
    return " x ".join(map(str, shape))


def metric_text(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.3e}"


def _scaled(count: int, units: Sequence[str]) -> str:
    if count < 1000:
        return f"{count} {units[0]}"
    value, steps = float(count), 0
    while value >= 999.5 and steps < len(units) - 1:
        value, steps = value / 1000, steps + 1
    return f"{three_digits(value)} {units[steps]}"


def three_digits(value: float) -> str:
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:,.{decimals}f}"
