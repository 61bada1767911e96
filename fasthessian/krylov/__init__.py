"""The engine that the algorithms share: Krylov runs, and what is computed from them.

* Runs: ``lanczos`` with a basis, ``three_term`` without one.
* Parts of a run: ``state`` (all that changes), ``basis``, ``coefficients``, ``candidate``,
  ``breakdown``, ``cuda_graph``.
* ``dots``: every dot product of the engine.
* Results: ``ritz`` and ``missing`` for eigenpairs; ``quadrature`` and ``smoothing`` for densities;
  ``hutchinson`` and ``intervals`` for traces.
* ``lockstep``: runs as generators of requests for products, so that many advance together;
  ``checkpointed`` says where the runs of a call are saved.
"""
