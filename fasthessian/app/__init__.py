"""The command line: commands, progress, the analysis of a problem and its report."""
