"""Fixed-point solvers; every one an `optimistix.AbstractFixedPointSolver`."""

from ._newton_krylov import NewtonKrylov as NewtonKrylov
from ._picard import Picard as Picard
from ._reversible import Reversible as Reversible
