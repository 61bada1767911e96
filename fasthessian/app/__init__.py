"""The command line: its commands and progress bars, the analysis of a problem and its report."""
