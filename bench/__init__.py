"""Benchmarks. ``make bench``, ``make gpu`` and ``make tune`` run them; see bench/README.md."""
