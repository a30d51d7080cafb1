"""What a report says of a quantized model: its bytes as integers, and what was not timed."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from lightning_compress.quantization.description import QuantizationDescription
from lightning_compress.quantization.lookup import quantized_of

# A float32 scale and a zero point of one byte.
SITE_BYTES = 5


def packed_size_bytes(model: nn.Module) -> int | None:
    """Bytes of the file of packed weights, and of the scales and zero points of activations; None if not quantized."""
    quantized = quantized_of(model)
    if quantized is None or not quantized.state.enabled or quantized.uncalibrated():
        return None
    # `export` reads checkpoints with the help of `report`, so that neither can import the other first.
    from lightning_compress.export.api import export

    with tempfile.TemporaryDirectory() as folder:
        written = export(model, Path(folder) / "packed.safetensors")
    return written.size_bytes + SITE_BYTES * _grids(quantized.describe())


@contextmanager
def quantizers_off(model: nn.Module, what: str) -> Iterator[None]:
    """With an attribute of the quantizers' mode switched off.

    Args:
        what: "enabled": in floating point, for quantizers imitate integers at a price that no deployed model pays;
            "observer_enabled": in the middle of a batch they would learn from what is measured.
    """
    quantized = quantized_of(model)
    if quantized is None:
        yield
        return
    before = getattr(quantized.state, what)
    setattr(quantized.state, what, False)
    try:
        yield
    finally:
        setattr(quantized.state, what, before)


def quantization_notes(model: nn.Module) -> list[str]:
    """What a reader of the numbers should know about a quantized model."""
    quantized = quantized_of(model)
    if quantized is None or not quantized.state.enabled:
        return []
    description = quantized.describe()
    scales = sum(spec.scales for spec in description.weights.values())
    floating = [f"{layer} ({why})" for layer, why in description.floating.items()]
    return [
        f"Quantized: {description.mean_bits:.2f} bits to a weight on average, {scales:,} scales of weights, "
        f"{_grids(description)} scales and zero points of activations, all in the bytes of the packed file. "
        f"Latency is that of the float32 network: export the model, and time the file.",
        *([f"Output in floating point: {', '.join(floating)}."] if floating else []),
    ]


def _grids(description: QuantizationDescription) -> int:
    """At how many places activations have a grid; short floating point has none."""
    return sum(spec.dtype is None for spec in description.activations.values())
