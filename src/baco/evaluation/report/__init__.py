"""The report of a run: one self-contained page, the same tables as CSV and Markdown, the plots."""

from baco.evaluation.report.export import Report, write_report
from baco.evaluation.report.tables import Section

__all__ = ["Report", "Section", "write_report"]
