"""The Krylov engine that the algorithms share: basis, steps, run state, Ritz pairs, quadrature."""
