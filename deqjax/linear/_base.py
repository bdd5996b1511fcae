"""What the linear solvers share: scaling, options, statistics, lineax's interface."""

import abc
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from .. import _tree
from .._checks import check_count, check_tolerance
from .._convolutions import rewrite
from .._types import Flags, Reals
from ._options import (
    as_arrays,
    check_preconditioner,
    check_start,
    shapes,
)

Linear = Callable[[PyTree], PyTree]

_DEFAULT_RTOL = {"bfloat16": 1e-2, "float16": 1e-2, "float32": 1e-5, "float64": 1e-8}


class System(eqx.Module):
    """A x = b per system, scaled and in at least float32.

    Attributes:
        product: v ↦ A v, around products in the operator's own dtype.
        precondition: v ↦ M v, M ≈ A⁻¹.
        b: the right-hand side, its largest entry in [1, 4); 0 for trivial systems.
        size: ‖b‖; 1 for trivial systems.
        guess: the start.
        at_zero: whether the start is known to be 0.
        tol: on ‖b − A x‖.
        trivial: b is 0, or not finite: there is nothing to iterate.
        bad: b is not finite.
        eps: the precision of the operator's dtype.
        seed: in [0, 1), another one for every system.
        measure: whether only a residual that was measured counts as convergence.
    """

    product: Linear
    precondition: Linear
    b: PyTree
    size: Reals
    guess: PyTree
    at_zero: bool
    tol: Reals
    trivial: Flags
    bad: Flags
    eps: float
    seed: Reals
    measure: bool

    def part(self, residual: Reals, products: Array, exact: Flags) -> Reals:
        """The c in (½, 1] of b − A(c x)/c, by which x is measured.

        It is b − A x if A is linear and acts on each system alone. Rounding errors of
        A, or a system that leaks into another one, do not scale along, so that a
        correction cannot have removed them: c differs between systems and between
        measurements. A first product, of a given start, takes c = 1. A c of 1 or ½
        adds no rounding errors of its own, where those are known to matter.
        """
        mixed = self.seed + 0.5545 * products.astype(residual.dtype)
        mixed = mixed + 613 * jnp.where(jnp.isfinite(residual), residual, 0)
        mixed = jnp.mod(mixed, 1)
        part = jnp.where(exact, jnp.where(mixed < 0.5, 1, 0.5), 1 - 0.5 * mixed)
        return jnp.where(products > 0, part, 1)


class Outcome(eqx.Module):
    """Where an iteration has ended; `residual` None if it measures none."""

    solution: PyTree
    residual: Reals | None
    converged: Flags
    failed: Flags
    stuck: Flags
    products: Array


class AbstractIterative(lx.AbstractLinearSolver[lx.AbstractLinearOperator]):
    """A linear solver that applies A only, to independent systems in step."""

    rtol: eqx.AbstractVar[float | Array | None]
    atol: eqx.AbstractVar[float | Array]
    batch_ndim: eqx.AbstractVar[int]

    def __check_init__(self):
        for name, tol in (("rtol", self.rtol), ("atol", self.atol)):
            if isinstance(tol, Array) or (name == "rtol" and tol is None):
                continue
            if not (isinstance(tol, int | float) and math.isfinite(tol) and tol >= 0):
                raise ValueError(
                    f"`{name}` must be a non-negative number; got {tol!r}."
                )
        check_count("batch_ndim", self.batch_ndim, 0)

    @abc.abstractmethod
    def iterate(self, system: System) -> Outcome:
        """Solve the scaled systems."""

    @property
    @abc.abstractmethod
    def most_products(self) -> int:
        """The number of products after which to give up."""

    # The interface of lineax

    def init(
        self, operator: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> lx.AbstractLinearOperator:
        name, structure = type(self).__name__, operator.in_structure()
        if operator.in_size() != operator.out_size():
            raise ValueError(
                f"`{name}` needs a square operator; got one from size "
                f"{operator.in_size()} to size {operator.out_size()}."
            )
        if shapes(structure) != shapes(operator.out_structure()):
            raise ValueError(
                f"`{name}` needs an operator whose images have the structure and the "
                f"shapes of its arguments; got one from {structure} to "
                f"{operator.out_structure()}."
            )
        for leaf in jtu.tree_leaves(structure):
            if leaf.dtype.name not in _DEFAULT_RTOL:
                raise TypeError(
                    f"`{name}` solves real systems in {', '.join(_DEFAULT_RTOL)}; got "
                    f"{leaf.dtype}."
                )
        # Its products are made in loops. Jaxprs are leaves of operators.
        return lx.linearise(rewrite(operator))

    def transpose(
        self, state: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> tuple[lx.AbstractLinearOperator, dict[str, Any]]:
        kept = {}
        if "preconditioner" in options:
            kept["preconditioner"] = options["preconditioner"].transpose()
        return state.transpose(), kept

    def conj(
        self, state: lx.AbstractLinearOperator, options: dict[str, Any]
    ) -> tuple[lx.AbstractLinearOperator, dict[str, Any]]:
        # Operators are real.
        return state, options

    def assume_full_rank(self) -> bool:
        return True

    def compute(
        self,
        state: lx.AbstractLinearOperator,
        vector: PyTree,
        options: dict[str, Any],
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        return self.solve(state.mv, vector, options)

    def solve(
        self, product: Linear, vector: PyTree, options: dict[str, Any]
    ) -> tuple[PyTree, lx.RESULTS, dict[str, Any]]:
        """Solve a system whose vectors look like the one given.

        `compute`, for callers whose product is a function: the operators of lineax
        convert closures, which takes time to trace, and loses what `jax.shard_map` and
        explicit meshes know of an array.
        """
        k, structure = self.batch_ndim, jax.eval_shape(lambda: vector)
        batch = _tree.batch_shape(vector, k)
        check_tolerance("rtol", 0.0 if self.rtol is None else self.rtol, batch)
        check_tolerance("atol", self.atol, batch)
        check_preconditioner(options, structure)
        check_start(options, structure)
        preconditioner = rewrite(options.get("preconditioner"))

        # Squares of small entries would vanish, those of large ones overflow. Scaled by
        # powers of two, the x returned is exactly the one whose residual is known.
        b = jtu.tree_map(lambda leaf: leaf.astype(_tree.wide(leaf.dtype)), vector)
        largest = _tree.max_abs(b, k)
        bad = ~jnp.isfinite(largest)
        trivial = bad | (largest < jnp.finfo(largest.dtype).tiny)
        unit = _tree.magnitude(b, k)
        b = _tree.where(trivial, _tree.zeros_like(b), _tree.scale(1 / unit, b))
        size = jnp.where(trivial, 1, _tree.norm(b, k))

        guess, start = _tree.zeros_like(b), options.get("y0")
        if start is not None:
            start = jtu.tree_map(lambda x, y: x.astype(y.dtype), as_arrays(start), b)
            start = _tree.scale(1 / unit, start)
            # A start that is not finite, from a solve that failed say, is none.
            guess = _tree.where(_tree.all_finite(start, k), start, guess)
        system = System(
            product=widened(product, vector),
            precondition=lambda v: (
                v if preconditioner is None else widened(preconditioner.mv, vector)(v)
            ),
            b=b,
            size=size,
            guess=guess,
            at_zero=start is None,
            tol=self._rtol(vector, size.dtype) * size
            + jnp.asarray(self.atol, size.dtype) / unit,
            trivial=trivial,
            bad=bad,
            eps=_precision(vector),
            seed=_seed(unit * jnp.asarray(options.get("unit", 1), unit.dtype), size),
            measure=bool(options.get("measure", True)),
        )
        final = self.iterate(system)

        solution = _tree.scale(jnp.where(trivial, 0, unit), final.solution)
        solution = _tree.scale(jnp.where(bad, jnp.nan, 1), solution)
        solution = jtu.tree_map(lambda x, v: x.astype(v.dtype), solution, vector)
        # What has been found may still be beyond the range of the dtype.
        finite = _tree.all_finite(solution, k)
        converged = final.converged & finite
        final = eqx.tree_at(lambda f: f.failed, final, final.failed | ~finite)
        stats: dict[str, Any] = {
            "num_products": final.products,
            "max_steps": self.most_products,
        }
        if final.residual is not None:
            residual = jnp.where(trivial & final.converged, 0, final.residual)
            residual = jnp.where(finite, residual, jnp.where(bad, jnp.nan, jnp.inf))
            stats["residual"] = residual * unit
            stats["relative_residual"] = residual / size
            stats["converged"] = converged
        return solution, _result(converged, final, bad), stats

    def _rtol(self, vector: PyTree, dtype: Any) -> Reals:
        rtol = self.rtol
        if rtol is None:
            names = [leaf.dtype.name for leaf in jtu.tree_leaves(vector)]
            rtol = max((_DEFAULT_RTOL[name] for name in names), default=1e-5)
        return jnp.asarray(rtol, dtype)


def widened(linear: Linear, like: PyTree) -> Linear:
    """v ↦ A v for v in the wide dtype, the product itself in the dtypes of `like`."""

    def apply(v: PyTree) -> PyTree:
        v = jtu.tree_map(lambda x, s: x.astype(s.dtype), v, like)
        return jtu.tree_map(lambda x: x.astype(_tree.wide(x.dtype)), linear(v))

    return apply


def _precision(structure: PyTree) -> float:
    """The coarsest relative spacing of the dtypes."""
    leaves = jtu.tree_leaves(structure)
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in leaves), default=0.0)


def _seed(unit: Reals, size: Reals) -> Reals:
    """A number in [0, 1) per system, of its scale, its norm and its place."""
    place = jnp.arange(size.size, dtype=size.dtype).reshape(size.shape)
    return jnp.mod(0.618034 * jnp.log2(unit) + 0.754878 * place + size, 1)


def _result(converged: Flags, final: Outcome, bad: Flags) -> lx.RESULTS:
    """The worst that has happened to any of the systems."""
    result = lx.RESULTS.where(
        jnp.all(converged), lx.RESULTS.successful, lx.RESULTS.max_steps_reached
    )
    result = lx.RESULTS.where(jnp.any(final.stuck), lx.RESULTS.stagnation, result)
    broken = final.failed & ~final.stuck & ~bad
    result = lx.RESULTS.where(jnp.any(broken), lx.RESULTS.breakdown, result)
    return lx.RESULTS.where(jnp.any(bad), lx.RESULTS.nonfinite_input, result)
