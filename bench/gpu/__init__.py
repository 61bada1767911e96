"""The benchmarks on a GPU: ``make gpu`` runs run.py, ``make tune`` runs tune.py."""
