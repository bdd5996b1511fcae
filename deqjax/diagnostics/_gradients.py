"""Adjoints compared on the user's own model, against the exact gradient."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from .. import _tree
from .._checks import check_count
from .._fixed_point import fixed_point
from ..adjoints import (
    BackwardStats,
    ImplicitAdjoint,
    JFBAdjoint,
    NeumannAdjoint,
    PhantomAdjoint,
    UnrolledAdjoint,
)
from ..linear import GMRES
from ..solvers import Anderson
from ._report import AbstractReport, Table, bars, octets, seconds
from ._state import as_rows, canonical_state, unflatten
from ._timing import measure, named


class GradientReport(AbstractReport):
    """Adjoints side by side, as measured by `gradient_report`.

    Attributes:
        names: of the adjoints; the entries of all arrays are in this order.
        reference: how the exact gradient was found, "dense" or "GMRES".
        reference_residual: ‖f(z) − z‖₂ of the point at which it was taken.
        reference_norm: ‖g‖₂ of the exact gradient g.
        error: ‖ĝ − g‖₂ / ‖g‖₂ over all parameters.
        angle: between ĝ and g, in degrees.
        ratio: ‖ĝ‖₂ / ‖g‖₂.
        num_products: vector–Jacobian products of the backward solve, NaN if the adjoint
            does not count any.
        converged: 1 if the backward solve met its tolerance, 0 if not, NaN if it has
            none.
        seconds: of one loss and gradient, the median.
        compile_seconds: to trace and compile.
        memory: bytes of temporary memory by the compiler's account, NaN where it gives
            none.
    """

    names: tuple[str, ...] = eqx.field(static=True)
    reference: str = eqx.field(static=True)
    reference_residual: Float[Array, ""]
    reference_norm: Float[Array, ""]
    error: Float[Array, " adjoints"]
    angle: Float[Array, " adjoints"]
    ratio: Float[Array, " adjoints"]
    num_products: Float[Array, " adjoints"]
    converged: Float[Array, " adjoints"]
    seconds: Float[Array, " adjoints"]
    compile_seconds: Float[Array, " adjoints"]
    memory: Float[Array, " adjoints"]

    def table(self) -> Table:
        rows = []
        for i, name in enumerate(self.names):
            converged = float(self.converged[i])
            rows.append(
                [
                    name,
                    self.error[i],
                    f"{float(self.angle[i]):.3g}°",
                    self.ratio[i],
                    self.num_products[i],
                    None if np.isnan(converged) else converged == 1,
                    seconds(self.seconds[i]),
                    seconds(self.compile_seconds[i]),
                    octets(self.memory[i]),
                ]
            )
        head = ["adjoint", "error", "angle", "length", "products", "converged"]
        head += ["time", "compile time", "memory"]
        how = {
            "dense": "a dense solve with I − J",
            "GMRES": "ImplicitAdjoint with a tight GMRES",
        }[self.reference]
        note = (
            f"Exact gradient: {how}, where the residual is "
            f"{float(self.reference_residual):.2g}; its norm is "
            f"{float(self.reference_norm):.4g}."
        )
        return Table("Gradients", head, rows, [note])

    def plot(self, ax: Any = None) -> Any:
        """The relative error of every adjoint on a logarithmic axis.

        Args:
            ax: matplotlib axes; by default those of a new figure.
        """
        label = "relative error of the gradient"
        return bars(ax, self.names, np.asarray(self.error), label)


def _half_square(z: PyTree) -> Array:
    """½‖z‖²."""
    return 0.5 * _tree.dot(z, z)


def gradient_report(
    fn: Callable[[Any, Any], Any],
    z0: PyTree,
    args: PyTree = None,
    *,
    solver: Any = None,
    adjoints: Mapping[str, Any] | Sequence[Any] | None = None,
    loss: Callable[[PyTree], Array] | None = None,
    max_steps: int = 64,
    dense_limit: int = 512,
    repeats: int = 5,
    batch_ndim: int = 0,
) -> GradientReport:
    r"""Compare adjoints with the exact gradient of a loss of the fixed point.

    $$ g = (\partial_\theta f)^\top (I - J)^{-\top} \nabla \ell(z^*), \qquad
       J = \partial_z f(z^*, \theta) $$

    θ are all floating-point arrays of `args` and in `fn` (if it is an
    `equinox.Module`); values that fn closes over are constants here.

    The reference is exact for the fixed point, not for the iterate at which a solver
    stops, so an error contains what the early stop costs. States of up to
    `dense_limit` entries are polished by Newton's method and solved with the dense
    matrix I − J. For larger ones Anderson acceleration goes on to a tight tolerance,
    and `ImplicitAdjoint` uses a tight GMRES; `reference` tells which it was.

    **Cost:** per adjoint one compilation and 1 + `repeats` gradients; for the
    reference, 11 dense Jacobians, or one long solve.

    Args:
        fn: `fn(z, args) -> z`.
        z0: the start: a pytree of real arrays.
        args: passed to fn.
        solver: of the forward pass. Default: `deqjax.Anderson()` with `batch_ndim`.
        adjoints: a dictionary from names to adjoints, or a sequence of adjoints; in
            place of an adjoint, a pair `(solver, adjoint)` has its own solver. Default:
            implicit, Neumann, phantom, JFB and unrolled.
        loss: a scalar function of the state. Default: ½‖z‖².
        max_steps: most steps of the forward solve.
        dense_limit: the largest state, in entries with the batch, for a dense solve.
        repeats: timed runs, of which the median is reported.
        batch_ndim: of the default solver.

    Returns:
        A `GradientReport`.

    Raises:
        ValueError, TypeError: if an argument is not valid, an array is being traced, or
            there is no array to differentiate by.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> f = lambda z, a: 0.5 * jnp.tanh(z) + a
        >>> report = deqjax.diagnostics.gradient_report(
        ...     f, jnp.zeros(3), jnp.ones(3),
        ...     adjoints={"exact": deqjax.ImplicitAdjoint(),
        ...               "cheap": deqjax.JFBAdjoint()})
        >>> report.reference, (report.error < 1e-3).tolist()
        ('dense', [True, False])

    References:
        S. Bai, J. Z. Kolter, V. Koltun (2019), Deep equilibrium models,
        doi:10.48550/arXiv.1909.01377.
    """
    for name, value, least in (
        ("max_steps", max_steps, 1),
        ("repeats", repeats, 1),
        ("dense_limit", dense_limit, 0),
    ):
        check_count(name, value, least)
    z0 = canonical_state(fn, z0, args, batch_ndim, "z0")
    solver = Anderson(batch_ndim=batch_ndim) if solver is None else solver
    loss = _half_square if loss is None else loss
    arrays, static = eqx.partition((fn, args), eqx.is_inexact_array)
    if not jtu.tree_leaves(arrays):
        raise ValueError(
            "Neither `args` nor `fn` has floating-point arrays to differentiate by. "
            "Pass what the gradient is for as `args`."
        )

    def defaults() -> dict[str, Any]:
        kinds = (
            ImplicitAdjoint,
            NeumannAdjoint,
            PhantomAdjoint,
            JFBAdjoint,
            UnrolledAdjoint,
        )
        return {k.__name__.removesuffix("Adjoint"): k() for k in kinds}

    chosen = named("adjoints", adjoints, defaults)
    start = fixed_point(fn, z0, args, solver=solver, max_steps=max_steps).value
    dense = _tree.size(z0) <= dense_limit
    reference = _dense if dense else _by_gmres
    exact, residual = reference(arrays, static, start, loss)
    exact = _flat(exact)
    size = np.linalg.norm(exact)

    rows = []
    for candidate in chosen.values():
        own, adjoint = (
            candidate if isinstance(candidate, tuple) else (solver, candidate)
        )
        counts = "probe" in {f.name for f in dataclasses.fields(adjoint)}

        def run(
            arrays: PyTree,
            probe: BackwardStats,
            z0: PyTree,
            own: Any = own,
            adjoint: Any = adjoint,
            counts: bool = counts,
        ) -> Array:
            fn, args = eqx.combine(arrays, static)
            if counts:
                adjoint = eqx.tree_at(
                    lambda a: a.probe, adjoint, probe, is_leaf=lambda x: x is None
                )
            sol = fixed_point(
                fn, z0, args, solver=own, adjoint=adjoint, max_steps=max_steps
            )
            return loss(sol.value)

        gradient = jax.value_and_grad(run, argnums=(0, 1))
        (_, (got, stats)), cost = measure(
            gradient, arrays, BackwardStats(), z0, repeats=repeats
        )
        got = _flat(got)
        rows.append(
            [
                np.linalg.norm(got - exact) / size if size > 0 else np.nan,
                _angle(got, exact),
                np.linalg.norm(got) / size if size > 0 else np.nan,
                float(stats.num_products) if counts else np.nan,
                float(stats.converged) if counts else np.nan,
                cost.seconds,
                cost.compile_seconds,
                cost.memory,
            ]
        )
    dtype = jnp.result_type(float)
    columns = [jnp.asarray(c, dtype) for c in np.array(rows).T]
    return GradientReport(
        tuple(chosen),
        "dense" if dense else "GMRES",
        jnp.asarray(float(residual), dtype),
        jnp.asarray(size, dtype),
        *columns,
    )


def _flat(tree: PyTree) -> np.ndarray:
    leaves = [np.asarray(a, np.float64).reshape(-1) for a in jtu.tree_leaves(tree)]
    return np.concatenate(leaves)


def _angle(a: np.ndarray, b: np.ndarray) -> float:
    """In degrees, and to full precision for small ones, unlike the arc cosine."""
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    if not all(np.isfinite(lengths)) or min(lengths) == 0:
        return float("nan")
    u, v = a / lengths[0], b / lengths[1]
    half = np.arctan2(np.linalg.norm(u - v), np.linalg.norm(u + v))
    return float(np.degrees(2 * half))


@eqx.filter_jit
def _dense(
    arrays: PyTree, static: PyTree, z: PyTree, loss: Callable
) -> tuple[PyTree, Array]:
    """Newton's method, then (I − J)⁻ᵀ, with dense Jacobians."""
    fn, args = eqx.combine(arrays, static)
    rows, f = as_rows(fn, z, args, 0)
    row, g = rows[0], lambda row: f(row[None])[0]
    eye = jnp.eye(row.size, dtype=row.dtype)

    def size(row: Array) -> Array:
        return jnp.linalg.norm(g(row) - row)

    def newton(_: Any, row: Array) -> Array:
        matrix = eye - jax.jacrev(g)(row)
        new = row + jnp.linalg.solve(matrix, g(row) - row)
        return jnp.where(size(new) < size(row), new, row)

    row = lax.fori_loop(0, 10, newton, row)
    slope = jax.grad(lambda row: loss(unflatten(row[None], z, 0)))(row)
    matrix = eye - jax.jacrev(g)(row)
    adjoint = jnp.linalg.solve(matrix.T, slope)

    def pulled(arrays: PyTree) -> PyTree:
        fn, args = eqx.combine(arrays, static)
        return fn(unflatten(row[None], z, 0), args)

    back = jax.vjp(pulled, arrays)[1]
    return back(unflatten(adjoint[None], z, 0))[0], size(row)


def _by_gmres(
    arrays: PyTree, static: PyTree, z: PyTree, loss: Callable
) -> tuple[PyTree, Array]:
    """`ImplicitAdjoint` at tight tolerances, forwards and backwards."""
    eps = max(float(jnp.finfo(a.dtype).eps) for a in jtu.tree_leaves(z))
    adjoint = ImplicitAdjoint(GMRES(rtol=30 * eps, max_steps=2000))

    @eqx.filter_jit
    def run(arrays: PyTree) -> tuple[PyTree, Array]:
        def objective(arrays: PyTree) -> tuple[Array, Array]:
            fn, args = eqx.combine(arrays, static)
            sol = fixed_point(
                fn,
                z,
                args,
                solver=Anderson(rtol=10 * eps, atol=0.0),
                adjoint=adjoint,
                max_steps=1000,
            )
            return loss(sol.value), sol.stats["residual"]

        return jax.grad(objective, has_aux=True)(arrays)

    return run(arrays)
