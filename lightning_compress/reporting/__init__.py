"""What a model holds and costs, measured and told: the values, and their forms in a terminal, a file and a web page."""

from lightning_compress.reporting.report import report
from lightning_compress.reporting.run_history import Boundary, Phase
from lightning_compress.reporting.values import Layer, Report

__all__ = ["Boundary", "Layer", "Phase", "Report", "report"]
