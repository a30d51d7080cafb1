"""Take a compressed model out of training: from a checkpoint, and into the files that others run."""

from lightning_compress.export.checkpoint import load_compressed

__all__ = ["load_compressed"]
