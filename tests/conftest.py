"""Shared by all tests: few threads, no stray files."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
