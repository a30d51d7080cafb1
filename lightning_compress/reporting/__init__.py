"""Reports on models: parameters, zeros, bytes, MACs and latency, for the terminal, JSON, HTML and loggers."""

from lightning_compress.reporting.api import report
from lightning_compress.reporting.report import Report
from lightning_compress.reporting.run_history import Boundary, Phase
from lightning_compress.reporting.values import LayerReport

__all__ = ["Boundary", "LayerReport", "Phase", "Report", "report"]
