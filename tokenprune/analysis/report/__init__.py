"""The report: one self-contained page about a sparsified model or a training run."""

from tokenprune.analysis.report.report import report

__all__ = ["report"]
