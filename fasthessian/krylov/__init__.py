"""The engine that the algorithms share: Krylov runs, and what is computed from them.

* Runs: ``lanczos`` with a basis, ``three_term`` without one.
* Parts of a run: ``state`` (all that changes), ``basis``, ``coefficients``, ``candidate``,
  ``breakdown``, ``cuda_graph``; ``state_file`` writes and reads states.
* ``dots``: every dot product of the engine.
* Results: ``ritz`` and ``missing`` for eigenpairs; ``quadrature`` and ``smoothing`` for densities;
  ``hutchinson`` and ``intervals`` for traces.
* ``lockstep``: runs as generators of requests for products, so that many advance together.
"""
