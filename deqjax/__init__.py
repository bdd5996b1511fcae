"""Deep equilibrium models and reversible deep equilibrium models for JAX."""

from . import (
    adjoints as adjoints,
    linear as linear,
    nn as nn,
    regularise as regularise,
    solvers as solvers,
)
from ._fixed_point import fixed_point as fixed_point
from .adjoints import (
    BackwardStats as BackwardStats,
    ImplicitAdjoint as ImplicitAdjoint,
    JFBAdjoint as JFBAdjoint,
    ReversibleAdjoint as ReversibleAdjoint,
    UnrolledAdjoint as UnrolledAdjoint,
)
from .solvers import Picard as Picard, Reversible as Reversible

__version__ = "0.1.0"
