"""Time by rounds: every contestant runs once per round, so all see the same machine."""

import statistics
import time


def rounds(functions, count=7, prepare=None):
    """Seconds of each named function, one call each per round in turn: {name: [s, ...]}."""
    times = {name: [] for name in functions}
    for _ in range(count):
        for name, function in functions.items():
            if prepare is not None:
                prepare()
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def median(times):
    """The median time of each function, from what `rounds` returns."""
    return {name: statistics.median(values) for name, values in times.items()}
