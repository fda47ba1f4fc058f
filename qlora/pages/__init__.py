"""What a run looks like: its page, and its line in a table of runs."""

from qlora.pages.curves import Points, smoothed
from qlora.pages.page import refresh_page
from qlora.pages.report import RunsReport, report

__all__ = ["Points", "RunsReport", "refresh_page", "report", "smoothed"]
