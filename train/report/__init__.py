"""What a finished run has to show: report.md beside it, made from the run's folder and nothing else."""
