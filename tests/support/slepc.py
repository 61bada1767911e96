"""SLEPc as a program: the largest eigenvalues of a symmetric matrix in a .npy file, as JSON.

    python3 tests/support/slepc.py MATRIX.npy COUNT

It runs in the Python of the system (Debian: python3-slepc4py-real), and knows the matrix by its
products alone.
"""

import json
import sys


def main(path, count):
    import numpy as np
    import slepc4py

    slepc4py.init([])
    from petsc4py import PETSc
    from slepc4py import SLEPc

    H = np.load(path)

    class Shell:
        def mult(self, matrix, x, y):
            y.setArray(H @ x.getArray(readonly=True))

    A = PETSc.Mat().createPython(H.shape, comm=PETSc.COMM_SELF)
    A.setPythonContext(Shell())
    A.setUp()
    solver = SLEPc.EPS().create(PETSc.COMM_SELF)
    solver.setOperators(A)
    solver.setProblemType(SLEPc.EPS.ProblemType.HEP)
    solver.setWhichEigenpairs(SLEPc.EPS.Which.LARGEST_REAL)
    solver.setDimensions(count, 4 * count)
    solver.setTolerances(1e-12)
    solver.solve()
    print(json.dumps([solver.getEigenvalue(i).real for i in range(count)]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
