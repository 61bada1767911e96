"""Shared by all tests: figures without a display, and one thread unless a test asks for more.

Spinning OpenMP threads on a machine whose cores are busy cost minutes; the tests of threading set
their number themselves.
"""

import os

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")
