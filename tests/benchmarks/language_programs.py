"""Prints what the compiled training steps of the language program hold, as JSON.

It is run with eight devices, of which a test process has only two.
"""

import json
import re

import jax
import jax.random as jr
import numpy as np

from benchmarks.common import training
from benchmarks.language._config import Config, preset_fields
from benchmarks.language._models import make_model
from benchmarks.language._train import loss_fn
from tests.adjoints.test_mesh import COLLECTIVE, called_by_loops

SIZES = {"dim": 32, "hidden": 64, "length": 16, "batch_size": 64}


def compile_step(mesh, solver_steps):
    """The compiled step of training on a mesh; None: on one device."""
    fields = {**preset_fields("tiny"), **SIZES, "solver_steps": solver_steps}
    config = Config(**fields)
    optimiser = training.make_optimiser(training.Schedule(1e-3, config.steps))
    state, static = training.init_state(
        make_model(config, 256), optimiser, key=jr.key(0)
    )
    placement = training.Placement(training.make_mesh(mesh))
    step = training.make_step(loss_fn, static, optimiser, placement=placement)
    batch = np.zeros((config.batch_size, config.length + 1), np.int32)
    state, batch = placement.put_state(state), placement.put_batch(batch)
    return step.lower(state, batch).compile()


def describe(mesh, solver_steps):
    """Collectives in all and in loops, and temporary memory per device."""
    program = compile_step(mesh, solver_steps)
    text = program.as_text()
    names = lambda part: re.findall(rf" {COLLECTIVE}(?:-start)?\(", part)
    return {
        "mesh": mesh,
        "solver_steps": solver_steps,
        "collectives": sorted(names(text)),
        "in_loops": names(called_by_loops(text)),
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    cases = [(None, 4)]
    cases += [(m, n) for m in ("data=8", "data=4,fsdp=2", "fsdp=8") for n in (4, 32)]
    with jax.numpy_dtype_promotion("standard"):
        print(json.dumps([describe(*case) for case in cases]))
