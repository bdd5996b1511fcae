"""Fixed-point solvers; every one an `optimistix.AbstractFixedPointSolver`."""

from ._anderson import Anderson as Anderson
from ._broyden import Broyden as Broyden
from ._newton_krylov import NewtonKrylov as NewtonKrylov
from ._picard import Picard as Picard
from ._reversible import Reversible as Reversible
