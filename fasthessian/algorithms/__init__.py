"""Algorithms: pure functions of an operator that return frozen records."""
