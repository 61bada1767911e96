"""The report of an analysis: result.json, figures and report.html."""
