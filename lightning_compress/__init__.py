"""Compression for existing PyTorch Lightning runs, as callbacks."""

from lightning_compress._version import __version__
from lightning_compress.channel_pruning.callback import ChannelPruning
from lightning_compress.distillation.callback import Distillation
from lightning_compress.distillation.teachers.network import BranchTeacher
from lightning_compress.distillation.teachers.peer import PeerTeacher
from lightning_compress.distillation.teachers.self_teachers import AveragedTeacher
from lightning_compress.export import export, load_compressed, load_packed
from lightning_compress.finetuning.callback import FineTuning
from lightning_compress.pruning.callback import Pruning
from lightning_compress.quantization.callback import QuantizationAwareTraining
from lightning_compress.quantization.lookup import remove_quantizers
from lightning_compress.quantization.ptq.quantize import quantize
from lightning_compress.recipe import Recipe
from lightning_compress.reporting import Report, report
from lightning_compress.reporting.callback import CompressionReport

__all__ = [
    "AveragedTeacher",
    "BranchTeacher",
    "ChannelPruning",
    "CompressionReport",
    "Distillation",
    "FineTuning",
    "PeerTeacher",
    "Pruning",
    "QuantizationAwareTraining",
    "Recipe",
    "Report",
    "__version__",
    "export",
    "load_compressed",
    "load_packed",
    "quantize",
    "remove_quantizers",
    "report",
]
