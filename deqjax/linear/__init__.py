"""Linear solvers made for the adjoint system I − J; all of them lineax solvers."""

from ._gmres import GMRES as GMRES
from ._neumann import Neumann as Neumann
