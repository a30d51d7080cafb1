"""Ranges of activations over a few batches: the mean of what each batch reached, in all of its calls together."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from lightning_compress.quantization.fake_quantizers import ActivationFakeQuantize
from lightning_compress.quantization.functional.ranges import Interval, exponential_average


class RangeAveraging:
    """Ranges of places whose method takes no widest range, while batches go by.

    Args:
        quantizers: all of the model.
    """

    def __init__(self, quantizers: Iterable[ActivationFakeQuantize]) -> None:
        self.quantizers = [one for one in quantizers if one.uses_observer and not one.range.widens]
        self.means: dict[ActivationFakeQuantize, Interval] = {}
        self.counts = dict.fromkeys(self.quantizers, 0)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within the context calls widen a range, up to the end of each batch; afterwards it is the mean."""
        before = [one.range for one in self.quantizers]
        for quantizer in self.quantizers:
            # A place that is passed several times in one batch is no more than a batch to the mean.
            quantizer.range = replace(quantizer.range, momentum=None)
        yield
        for quantizer, own in zip(self.quantizers, before, strict=True):
            quantizer.range = own
            if quantizer in self.means:
                self._take_mean(quantizer)

    def end_batch(self) -> None:
        """Count what this batch has reached, and let the next one begin anew."""
        for quantizer in self.quantizers:
            if quantizer.calibrated:
                self.counts[quantizer] += 1
                reached = quantizer.minimum.clone(), quantizer.maximum.clone()
                old = self.means.get(quantizer, reached)
                self.means[quantizer] = exponential_average(old, reached, 1 / self.counts[quantizer])
                quantizer.calibrated = False

    @torch.no_grad()
    def _take_mean(self, quantizer: ActivationFakeQuantize) -> None:
        quant_min, quant_max = self.means[quantizer]
        quantizer.minimum.copy_(quant_min), quantizer.maximum.copy_(quant_max)
        quantizer.compute_qparams()
        quantizer.calibrated = True
