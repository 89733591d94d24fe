"""The report of a finished run: report.md, report.html and report.json, made from the run's folder alone."""
