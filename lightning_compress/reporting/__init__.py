"""What a model holds and costs, measured and told: the values, and their forms in a terminal, a file and a web page."""

from lightning_compress.reporting.api import report
from lightning_compress.reporting.report import Report
from lightning_compress.reporting.run_history import Boundary, Phase
from lightning_compress.reporting.values import LayerReport

__all__ = ["Boundary", "LayerReport", "Phase", "Report", "report"]
