"""The loop of every solve: this is where f runs, forwards.

    begin  ->  advance  ->  …  ->  advance  ->  finish

`Iteration.advance` is one evaluation of f, entered into the record and made use of by
the solver's `update`. `Stepwise` is the same for solvers that know optimistix's four
methods alone. `drive` runs the loop; adjoints that need a part of it run its pieces.
"""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, Int, PyTree

from .. import _tree
from .._problem import Problem, Solved
from .._steps import at_step
from .._types import Flags
from .._upstream import UNROLL, in_shard_map, unvmap_any, unvmap_max, while_loop
from ._record import Record, statistics

Kind = Literal["lax", "checkpointed"]


class State(eqx.Module):
    """The state of a solver of deqjax.

    Attributes:
        memory: what the method carries from step to step.
        record: the record of the solve.
        last: in a solve that keeps no best iterate, the point evaluated last and f of
            it, without derivatives.
        index: evaluations so far, the same for all problems and lanes.
        num_evals: those made while any problem was active.
    """

    memory: PyTree
    record: Record
    last: PyTree
    index: Int[Array, ""]
    num_evals: Int[Array, ""]

    @property
    def companion(self) -> PyTree:
        """The second state y of `deqjax.Reversible`, which goes with the answer z."""
        return self.memory


class Trial(eqx.Module):
    """What an update is told of an evaluation, beside f.

    Attributes:
        index: evaluations before this one, the same for all problems.
        before: the problems that the evaluation counts for; None: all.
        after: those that go on; None: all.
        record: the record with this evaluation in it.
        products: what `AbstractSolver.evaluate` gave beside f.
    """

    index: Array
    before: Flags | None
    after: Flags | None
    record: Record
    products: Any


class Carry(eqx.Module):
    """What the loop carries.

    Attributes:
        z: the iterate.
        state: the arrays of the solver's state.
        aux: that of the last evaluation, if the record does not keep the best one's.
        history: the residual of every step, NaN after the end, if it is asked for.
        tape: what the steps have lost, if it is asked for.
        status: of a `Stepwise` iteration, whether it is done, and with what result.
    """

    z: PyTree
    state: PyTree
    aux: PyTree = None
    history: Array | None = None
    tape: PyTree = None
    status: PyTree = None


class Iteration:
    """The solve of a problem by a solver of deqjax."""

    def __init__(self, problem: Problem):
        self.problem, self.solver = problem, problem.solver
        self.static, self.per_step = self.solver.static, self.solver.evals_per_step
        self.limited = "step_budget" in problem.options

    def begin(self, tape: Any = None) -> Carry:
        """The carry before the first evaluation."""
        problem, solver = self.problem, self.solver
        z, k = problem.y0, solver.batch_ndim
        _tree.batch_shape(z, k)  # raises unless the leaves agree
        memory = solver.init_memory(z, problem.options)
        if solver.keeps_best:
            start = z, solver.kept(memory)
            record, last = Record.start(start, z, problem.aux_struct, k), None
            aux = None
        else:
            record, last = Record.start(None, z, None, k), lax.stop_gradient((z, z))
            aux = _tree.zeros_like(problem.aux_struct)
        zero = jnp.array(0, jnp.int32)
        state = State(memory, record, last, zero, zero)
        row = lambda: record.residual
        carry = Carry(z, state, aux, _blank_history(problem, row), tape)
        return _tree.varying(carry, z)

    def advance(self, carry: Carry) -> Carry:
        """One evaluation of f, for all problems, and what the solver makes of it."""
        problem, solver, state = self.problem, self.solver, carry.state
        z, h, memory = carry.z, state.index, state.memory
        args = at_step(problem.args, h // self.per_step)

        f, aux, products = solver.evaluate(problem.fn, z, args)

        record, last, num_evals = state.record, None, state.num_evals
        if solver.keeps_best:
            before = tests = record.active(problem.options)
            if self.per_step > 1:
                tests = before & (h % self.per_step == 0)
            record = solver.enter(record, tests, z, memory, f, aux)
            after, aux = record.active(problem.options), None
            num_evals = num_evals + jnp.any(before).astype(jnp.int32)
        else:
            before = after = tests = None
            last = lax.stop_gradient((z, f))
            if self.limited:
                # Problems, and the lanes of a `jax.vmap`, may have other budgets. A
                # solve of no steps evaluates f once, for what it reports.
                wanted = self._wanted()
                before = after = tests = h < wanted
                counts = h < jnp.maximum(wanted, 1)
                last = _tree.where(counts, last, state.last)
                if carry.aux is not None:
                    aux = _tree.where(counts, aux, carry.aux)

        trial = Trial(h, before, after, record, products)
        new, new_memory = solver.update(z, f, memory, trial)
        tape = carry.tape
        if tape is not None:
            tape = tape.write(h, z, memory, f, new)
        if after is not None:
            new = _tree.where(after, new, z)
            if not solver.freezes_memory:
                new_memory = _tree.where(after, new_memory, memory)
        history = carry.history
        if history is not None:
            size = record.last_residual if last is None else self._sizes(last)[0]
            history = _written(history, h // self.per_step, size, tests)
        state = State(new_memory, record, last, h + 1, num_evals)
        return Carry(new, state, aux, history, tape)

    def skip(self, carry: Carry) -> Carry:
        """No evaluation, as if there had been one."""
        index = carry.state.index + 1
        return eqx.tree_at(lambda carry: carry.state.index, carry, index)

    def going(self, carry: Carry) -> Array:
        """Whether a tested solve goes on.

        Not batched under `jax.vmap`: the loop runs while any lane does, and lanes that
        are done freeze by themselves, without a select over their whole carry.
        """
        return unvmap_any(jnp.any(carry.state.record.active(self.problem.options)))

    @property
    def most(self) -> int | None:
        """The most evaluations; nothing follows the last test."""
        steps, n = self.problem.max_steps, self.per_step
        if not self.static:
            return None if steps is None else n * (steps - 1) + 1
        if steps is None:
            raise ValueError(
                "`rtol=None, atol=None` asks for exactly `max_steps` steps, but "
                "`max_steps` is None; give a number of steps, or tolerances."
            )
        return n * steps

    @property
    def trips(self) -> Any:
        """The evaluations of a solve without a test, of all problems and lanes."""
        if not self.limited:
            return self.most
        return unvmap_max(jnp.max(jnp.maximum(self._wanted(), 1)))

    def index(self, carry: Carry) -> Array:
        """The evaluations so far."""
        return carry.state.index

    def finish(self, carry: Carry) -> Solved:
        """The one place where the end of a solve becomes its answer."""
        state, solver, results = carry.state, self.solver, optx.RESULTS
        record, memory, num_evals = state.record, state.memory, state.num_evals
        if solver.keeps_best:
            (value, kept), aux = record.value, record.aux
            memory = memory if kept is None else kept
            num_steps = record.num_steps
            finite = jnp.all(jnp.isfinite(record.residual))
        else:
            value, aux = carry.z, carry.aux
            residual, norm = self._sizes(state.last)
            sizes = jnp.stack([residual, norm, residual], -1)
            record = eqx.tree_at(lambda r: r.sizes, record, sizes)
            num_steps = jnp.zeros_like(record.num_steps) + state.index // self.per_step
            num_evals = state.index
            finite = _tree.all_finite(lax.stop_gradient(value))
            if self.limited:
                most = jnp.max(jnp.maximum(self._wanted(), 1))
                num_evals = jnp.minimum(most, num_evals)
        if self.limited:
            budget = jnp.maximum(self.problem.options["step_budget"], 0)
            num_steps = jnp.minimum(num_steps, budget)
        record = record.with_steps(num_steps)
        if self.static:
            result = results.where(finite, results.successful, results.nonfinite)
        else:
            done, result = record.status()
            result = results.where(done, result, results.nonlinear_max_steps_reached)
        sizes, converged = (record.residual, record.norm), record.converged
        stats = statistics(*sizes, converged, num_steps, num_evals)
        stats |= solver.extra_statistics(memory)
        if carry.history is not None:
            stats["residual_history"] = carry.history
        return Solved.of(
            value,
            aux,
            jnp.max(num_steps, initial=0),
            result,
            State(memory, record, state.last, state.index, num_evals),
            stats,
            companion=memory if self.per_step > 1 else None,
            tape=carry.tape,
        )

    def _wanted(self) -> Array:
        """The evaluations that a budget allows, without a test."""
        budget, most = self.problem.options["step_budget"], self.problem.max_steps
        return self.per_step * (budget if most is None else jnp.minimum(budget, most))

    def _sizes(self, last: tuple[PyTree, PyTree]) -> tuple[Array, Array]:
        z, f = last
        k = self.solver.batch_ndim
        return _tree.norm(_tree.subtract(f, z), k), _tree.norm(f, k)


class Stepwise:
    """The solve of a problem by a solver that has optimistix's four methods alone."""

    static, per_step = False, 1

    def __init__(self, problem: Problem):
        self.problem, self.solver = problem, problem.solver
        fn, solver, *given, _, f_struct, aux_struct, tags, _ = problem
        state = solver.init(fn, *given, f_struct, aux_struct, tags)
        self.first, self.others = eqx.partition(state, eqx.is_array)

    def begin(self, tape: Any = None) -> Carry:
        problem, y, aux_struct = self.problem, self.problem.y0, self.problem.aux_struct
        state = eqx.combine(self.first, self.others)
        aux = jtu.tree_map(
            lambda x: _tree.zeros_like(x) if isinstance(x, jax.ShapeDtypeStruct) else x,
            aux_struct,
        )
        row = lambda: self._residual(state)
        history, status = _blank_history(problem, row), self._status(y, state)
        return Carry(y, (jnp.array(0), self.first), aux, history, status=status)

    def advance(self, carry: Carry) -> Carry:
        problem = self.problem
        num_steps, state = carry.state
        before = carry.z, problem.args, problem.options
        state = eqx.combine(state, self.others)
        z, state, aux = self.solver.step(problem.fn, *before, state, problem.tags)
        arrays, _ = eqx.partition(state, eqx.is_array)
        history = carry.history
        if history is not None:
            history = _written(history, num_steps, self._residual(state))
        status = self._status(carry.z, state)
        return Carry(z, (num_steps + 1, arrays), aux, history, status=status)

    def going(self, carry: Carry) -> Array:
        done, result = carry.status
        going = ~done & (result == optx.RESULTS.successful)
        if "step_budget" in self.problem.options:
            budget = jnp.max(self.problem.options["step_budget"])
            going = going & (self.index(carry) < budget)
        return going

    @property
    def most(self) -> int | None:
        return self.problem.max_steps

    def index(self, carry: Carry) -> Array:
        return carry.state[0]

    def finish(self, carry: Carry) -> Solved:
        problem, results = self.problem, optx.RESULTS
        (num_steps, state), (done, result) = carry.state, carry.status
        state = eqx.combine(state, self.others)
        unfinished = (result == results.successful) & ~done
        most = results.nonlinear_max_steps_reached
        result = results.where(unfinished, most, result)
        end = carry.z, carry.aux, problem.args, problem.options
        value, aux, stats = self.solver.postprocess(
            problem.fn, *end, state, problem.tags, result
        )
        if carry.history is not None:
            stats = {**stats, "residual_history": carry.history}
        return Solved.of(value, aux, num_steps, result, state, stats)

    def _status(self, z: PyTree, state: Any) -> tuple[Array, optx.RESULTS]:
        problem, results = self.problem, optx.RESULTS
        given = z, problem.args, problem.options, state, problem.tags
        done, result = self.solver.terminate(problem.fn, *given)
        finite = _tree.all_finite(eqx.filter(z, eqx.is_inexact_array))
        return done, results.where(finite, result, results.nonfinite)

    def _residual(self, state: Any) -> Array:
        find = getattr(self.solver, "last_residual", None)
        if find is None:
            raise ValueError(
                '`options={"record": True}` needs `deqjax.fixed_point` or a deqjax '
                f"solver; got {type(self.solver).__name__}."
            )
        return find(state)


def iteration(problem: Problem) -> Any:
    """The solve of a problem, by whichever solver it has."""
    return getattr(problem.solver, "iteration", Stepwise)(problem)


def drive(
    problem: Problem,
    *,
    tape: Any = None,
    kind: Kind = "lax",
    checkpoints: int | None = None,
) -> Solved:
    """Solve a problem.

    Args:
        problem: what is to be solved.
        tape: an empty tape, for a solver whose steps are to be undone.
        kind: `"checkpointed"` for a loop that reverse mode differentiates.
        checkpoints: how many states such a loop keeps; None: a number by its length.
    """
    run = iteration(problem)
    carry = run.begin(tape)
    if not run.static:
        carry = loop(run, carry, run.going, run.most, kind, checkpoints)
    elif kind == "lax":
        trip = lambda _, carry: run.advance(carry)
        carry = lax.fori_loop(0, run.trips, trip, carry)
    else:
        carry = up_to(run, carry, run.trips, run.most, checkpoints)
    return run.finish(carry)


def loop(
    run: Any,
    carry: Carry,
    going: Any,
    most: int | None,
    kind: Kind = "lax",
    checkpoints: int | None = None,
) -> Carry:
    """Advance while `going(carry)`, for at most `most` evaluations in all."""
    if kind == "lax":
        within = lambda carry: True if most is None else run.index(carry) < most
        return lax.while_loop(
            lambda carry: going(carry) & within(carry), run.advance, carry
        )
    if most is not None and in_shard_map():
        # equinox's loop does not know what varies there. Every state is kept.
        step = jax.checkpoint(
            lambda carry: lax.cond(going(carry), run.advance, lambda c: c, carry)
        )
        return lax.scan(lambda carry, _: (step(carry), None), carry, length=most)[0]
    return while_loop(
        going,
        run.advance,
        carry,
        max_steps=most,
        kind="checkpointed",
        checkpoints=checkpoints,
    )


def up_to(
    run: Any, carry: Carry, stop: Any, size: int, checkpoints: int | None
) -> Carry:
    """Advance to evaluation `stop` in at most `size` of them; reverse mode too."""
    few = size <= UNROLL * run.per_step and checkpoints is None
    if few and isinstance(stop, int):
        for _ in range(size):
            carry = run.advance(carry)
        return carry
    going = lambda carry: jnp.asarray(run.index(carry) < stop)
    return loop(run, carry, going, size, "checkpointed", checkpoints)


def _blank_history(problem: Problem, row: Any) -> Array | None:
    """NaNs to be filled with residuals like `row()`, if they are asked for."""
    if not problem.options.get("record", False):
        return None
    blank = jnp.full_like(row(), jnp.nan)
    if problem.max_steps is None:
        raise ValueError('`options={"record": True}` needs a finite `max_steps`.')
    return jnp.broadcast_to(blank, (problem.max_steps, *blank.shape))


def _written(
    history: Array, step: Array, residual: Array, only: Flags | None = None
) -> Array:
    """The history with the residuals of a step, of some problems."""
    if only is not None:
        residual = jnp.where(only, residual, history[step])
    return history.at[step].set(residual)
