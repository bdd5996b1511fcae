"""One training loop for all benchmark programs: state, step, checkpoints, metrics.

A program builds a model, a loss `loss(model, batch, key) -> (scalar, metrics)` and
batches that are indexed by step, and hands them to `fit`:

    optimiser = make_optimiser(Schedule(learning_rate=3e-3, steps=1000))
    state, static = init_state(model, optimiser, key=jr.key(0))
    step = make_step(loss, static, optimiser)
    with Checkpoints(directory) as checkpoints, MetricsLog(path) as log:
        result = fit(state, step, batches, steps=1000, checkpoints=checkpoints, log=log)

The batch of a step is a function of the step alone, `batches[step]`, so the place of
the data in a checkpoint is the number of its step. A `grain.MapDataset` is such
batches.
"""

from ._checkpoints import (
    CheckpointError as CheckpointError,
    Checkpoints as Checkpoints,
)
from ._errors import TrainingError as TrainingError
from ._figures import Curve as Curve, draw_curves as draw_curves, use_style as use_style
from ._interrupts import Interrupts as Interrupts
from ._loop import Batches as Batches, FitResult as FitResult, fit as fit
from ._mesh import (
    MeshError as MeshError,
    Placement as Placement,
    make_mesh as make_mesh,
)
from ._metrics import (
    MetricsLog as MetricsLog,
    read_metrics as read_metrics,
    write_atomically as write_atomically,
)
from ._optimiser import (
    SHAPES as SHAPES,
    Schedule as Schedule,
    make_optimiser as make_optimiser,
)
from ._precision import cast_linear as cast_linear
from ._processes import (
    ProcessError as ProcessError,
    agree as agree,
    is_main as is_main,
    join_processes as join_processes,
)
from ._progress import ProgressDisplay as ProgressDisplay
from ._state import (
    TrainState as TrainState,
    best_params as best_params,
    init_state as init_state,
)
from ._step import make_step as make_step
