"""Deep equilibrium models and reversible deep equilibrium models for JAX.

`fixed_point(fn, z0, args)` solves z* = fn(z*, args) and differentiates through it.

| | |
|---|---|
| `solver=` | how it is solved: `Anderson`, `Picard`, `Broyden`, `NewtonKrylov`, `Reversible`, or a solver of optimistix |
| `adjoint=` | its gradient: `ImplicitAdjoint`, `ReversibleAdjoint`, `UnrolledAdjoint`, and cheaper, biased ones |
| `deqjax.nn` | layers: `DEQ(cell)`, `RevDEQ(cell)`; starts, dropout, normalisation; cells |
| `deqjax.models` | published language and image models, all with one interface |
| `deqjax.regularise` | penalties that keep a map solvable |
| `deqjax.diagnostics` | reports on maps, solvers and gradients; `summary(sol)` in a line or two |

Solutions are `optimistix.Solution`s: `sol.value`, `sol.result`, `sol.stats`.
"""  # noqa: E501 (a row of the table cannot be broken)

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
