"""Deep equilibrium models and reversible deep equilibrium models for JAX."""

from . import (
    adjoints as adjoints,
    diagnostics as diagnostics,
    linear as linear,
    models as models,
    nn as nn,
    regularise as regularise,
    solvers as solvers,
)
from ._fixed_point import fixed_point as fixed_point
from .adjoints import (
    BackwardStats as BackwardStats,
    ImplicitAdjoint as ImplicitAdjoint,
    JFBAdjoint as JFBAdjoint,
    NeumannAdjoint as NeumannAdjoint,
    PhantomAdjoint as PhantomAdjoint,
    ReversibleAdjoint as ReversibleAdjoint,
    ShineAdjoint as ShineAdjoint,
    UnrolledAdjoint as UnrolledAdjoint,
)
from .diagnostics import summary as summary
from .solvers import (
    Anderson as Anderson,
    Broyden as Broyden,
    NewtonKrylov as NewtonKrylov,
    Picard as Picard,
    Reversible as Reversible,
)

__version__ = "0.1.0"
