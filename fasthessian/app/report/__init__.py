"""The report of an analysis: ``result.json``, the figures as PNG files and ``report.html``."""
