"""Take a compressed model out of training: from a checkpoint, and into the files that others run."""

from lightning_compress.export.checkpoint import load_compressed
from lightning_compress.export.exporting import export
from lightning_compress.export.packed import load_packed

__all__ = ["export", "load_compressed", "load_packed"]
