"""The report that every run writes."""

from biasunlearn_trainer.eval.report.table import terminal_table
from biasunlearn_trainer.eval.report.write import write_report

__all__ = ["terminal_table", "write_report"]
