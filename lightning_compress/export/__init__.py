"""Take a compressed model out of training: from a checkpoint, and into the files that others run."""

from lightning_compress.export.api import export
from lightning_compress.export.load import load_compressed
from lightning_compress.export.packed.write import load_packed

__all__ = ["export", "load_compressed", "load_packed"]
