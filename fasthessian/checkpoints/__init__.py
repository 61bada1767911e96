"""Checkpoints of runs: folders of safetensors files and JSON indexes, written whole or not at all.

* ``state``: what of a run is saved; ``states``: the states of a run by name.
* ``shards``: the files of tensors, whose columns may be split over ranks.
* ``folder``: the generations of a checkpoint; ``index``: the index of one.
* ``call``: the call of an algorithm that a checkpoint belongs to.
* ``keeper``: when a call is saved, and when it stops.
"""
