"""Fixed-point solvers; every one an `optimistix.AbstractFixedPointSolver`."""

from ._anderson import Anderson as Anderson
from ._base import AbstractSolver as AbstractSolver
from ._broyden import Broyden as Broyden
from ._drive import Trial as Trial
from ._newton_krylov import NewtonKrylov as NewtonKrylov
from ._picard import Picard as Picard
from ._reversible import Reversible as Reversible
