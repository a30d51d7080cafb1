"""Bits that fall from many to few while a network gets used to it."""

from dataclasses import dataclass

from lightning_compress.core.interpolation import interpolate
from lightning_compress.core.phases import PhaseWindow
from lightning_compress.core.schedules import Schedule
from lightning_compress.quantization.config import QuantizationConfig
from lightning_compress.quantization.functional.formats import parse_format
from lightning_compress.quantization.quantized_model import QuantizedModel


@dataclass(frozen=True)
class BitWidthSchedule:
    """From the initial bits to those of a request.

    Args:
        initial_bits: of all that has fewer in the end.
        schedule: share of the way behind the phase, to share of the way between the bits.
        request: what is asked for in the end.

    Raises:
        ValueError: if nothing can fall, or the final formats are no whole number of bits.
    """

    initial_bits: int
    schedule: Schedule
    request: QuantizationConfig

    def __post_init__(self) -> None:
        form, final = parse_format(self.initial_bits), self._final()
        if form is None or form.dtype is not None or not all(isinstance(one, int) for one in final):
            raise ValueError(
                f"initial_bits={self.initial_bits!r} and {final} are not all whole numbers of bits to fall between."
            )
        if self.initial_bits <= min(final):
            raise ValueError(
                f"initial_bits={self.initial_bits} are no more than the final bits {final}: nothing would fall."
            )

    def timeline(self, window: PhaseWindow) -> list[tuple[int, str]]:
        """When the bits may change, and to what those of the weights, or else of the activations, do."""
        final = self._final()[0]
        return [
            (time, f"{bits_at(self.initial_bits, final, self._share(time, window))} bits") for time in window.times()
        ]

    def apply(self, quantized: QuantizedModel, time: int, window: PhaseWindow) -> None:
        """Set the bits that are due at this moment."""
        share = self._share(time, window)
        for quantizer in quantized.quantizers():
            bits = bits_at(self.initial_bits, quantizer.final.bits, share)
            if (
                quantizer.final.dtype is None
                and bits != quantizer.fmt.bits
                and (form := parse_format(bits, quantizer.side))
            ):
                quantizer.change_format(form)

    def _final(self) -> list[int]:
        return [one for one in (self.request.weights, self.request.activations) if one is not None]  # type: ignore[misc]

    def _share(self, time: int, window: PhaseWindow) -> float:
        return self.schedule(window.progress(time))


def bits_at(initial: int, final: int, share: float) -> int:
    """Bits between the initial and the final ones; what has more of them already keeps those.

    >>> [bits_at(8, 4, share) for share in (0.0, 0.5, 1.0)], bits_at(8, 16, 0.0)
    ([8, 6, 4], 16)
    """
    return final if final >= initial else round(interpolate(initial, final, share))
