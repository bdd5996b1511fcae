"""Eigenvalues and singular values of the Jacobian at a fixed point."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Complex, Float, Int, PRNGKeyArray, PyTree

from .._checks import check_count
from ._krylov import extreme, leading
from ._report import AbstractReport, Table, axes, problem_names
from ._state import (
    batch_of,
    canonical_state,
    flatten,
    jacobian,
    to_batch,
)


class Spectrum(AbstractReport):
    """The leading eigenvalues of a Jacobian, as found by `spectrum`.

    Attributes:
        eigenvalues: of J, by falling modulus.
        residual: ‖J x − λ x‖₂ of the unit vector x found for each, computed by
            products of its own.
        error: a first-order estimate of the error of each, `residual` times the
            condition of the eigenvalue in the projected problem.
        converged: whether `residual` is within the tolerance.
        spectral_radius: the largest |λ|.
        num_products: Jacobian products taken by the slowest problem.
    """

    eigenvalues: Complex[Array, "*batch num"]
    residual: Float[Array, "*batch num"]
    error: Float[Array, "*batch num"]
    converged: Bool[Array, "*batch num"]
    spectral_radius: Float[Array, "*batch"]
    num_products: Int[Array, ""]

    def table(self) -> Table:
        *batch, num = self.eigenvalues.shape
        columns = [
            np.asarray(x).reshape(-1, num)
            for x in (self.eigenvalues, self.residual, self.error, self.converged)
        ]
        rows = []
        for i, name in enumerate(problem_names(tuple(batch))):
            for k in range(num):
                value, residual, error, converged = (c[i, k] for c in columns)
                row = [value, float(np.abs(value)), residual, error, bool(converged)]
                rows.append([name, *row] if batch else row)
        head = ["λ", "|λ|", "residual", "error", "converged"]
        largest = np.asarray(self.spectral_radius)
        title = f"Spectrum of J: spectral radius {np.max(largest):.4g}"
        return Table(
            title + (", the largest of the batch" if batch else ""),
            ["problem", *head] if batch else head,
            rows,
            [f"{int(self.num_products)} products with J."],
        )

    def plot(self, ax: Any = None) -> Any:
        """The eigenvalues in the complex plane, and the unit circle.

        Args:
            ax: matplotlib axes; by default those of a new figure.
        """
        ax = axes(ax, (4.0, 4.0))
        angle = np.linspace(0, 2 * np.pi, 200)
        ax.plot(np.cos(angle), np.sin(angle), color="0.6", lw=1, label="|λ| = 1")
        values: Any = np.asarray(self.eigenvalues).reshape(-1)
        good = np.asarray(self.converged).reshape(-1)
        for mask, name, fill in (
            (good, "converged", "tab:blue"),
            (~good, "not converged", "none"),
        ):
            if mask.any():
                x, y = values[mask].real, values[mask].imag
                ax.scatter(x, y, facecolors=fill, edgecolors="tab:blue", label=name)
        ax.set_aspect("equal")
        ax.set_xlabel("real part of λ")
        ax.set_ylabel("imaginary part of λ")
        ax.legend(loc="best")
        return ax


_EIGENVALUES = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-5, "float64": 1e-9}
SINGULAR = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-3, "float64": 1e-6}


def tolerance(rtol: Any, z: PyTree, defaults: dict[str, float]) -> float:
    """The tolerance given, or that of the least precise dtype of the state."""
    if rtol is None:
        return max(defaults.get(a.dtype.name, 1e-2) for a in jtu.tree_leaves(z))
    if isinstance(rtol, bool) or not (isinstance(rtol, int | float) and 0 < rtol < 1):
        raise ValueError(f"`rtol` must be a number in (0, 1); got {rtol!r}.")
    return float(rtol)


def spectrum(
    fn: Callable[[Any, Any], Any],
    z: PyTree,
    args: PyTree = None,
    *,
    num: int = 4,
    rtol: float | None = None,
    basis: int = 30,
    max_restarts: int = 100,
    mode: str = "jvp",
    batch_ndim: int = 0,
    key: PRNGKeyArray | None = None,
) -> Spectrum:
    r"""The eigenvalues of largest modulus of J = ∂f/∂z, by restarted Arnoldi.

    Arnoldi's method builds an orthonormal basis V of a Krylov space with

    $$ J V = V S + v\, b^\top, \qquad S y = \theta y
       \;\Rightarrow\; \lVert J V y - \theta V y \rVert = | b^\top y | . $$

    When the basis is full it is restarted with the leading part of a real Schur form of
    S (Krylov–Schur), so that complex pairs stay together, until the residuals of the
    `num` leading pairs meet the tolerance. Then ‖J x − θ x‖ is computed anew, by
    products, and reported.

    A small residual says that θ is an eigenvalue of a matrix near J. For a non-normal
    J it may be off by `residual` times its condition, which is what `error` estimates.
    No Krylov method proves that there is no larger eigenvalue elsewhere, but a random
    start misses one with probability zero, up to rounding.

    **Cost:** one linearisation of fn per cycle, at most `basis` products in a cycle,
    and 2 × `num` products for the residuals; f is not evaluated otherwise. **Memory:**
    `basis` + 1 states in at least float32. States of at most `basis` entries are
    solved in one cycle, exactly up to rounding.

    Args:
        fn: `fn(z, args) -> z`.
        z: where J is taken, usually the fixed point: a pytree of real arrays.
        args: passed to fn.
        num: how many eigenvalues.
        rtol: tolerance on `residual` over |λ| (for an eigenvalue that vanishes beside
            ‖J‖, over 2.4e-5 ‖J‖). By default 1e-5 in float32, 1e-9 in float64, 1e-2
            in float16 and 5e-2 in bfloat16.
        basis: vectors of a cycle; at least `num` + 3 are taken.
        max_restarts: most restarts.
        mode: `"jvp"`, or `"vjp"` for maps without forward mode: the eigenvalues of Jᵀ
            are those of J.
        batch_ndim: leading axes that index independent problems.
        key: decides where the iteration starts. Default: `jax.random.key(0)`.

    Returns:
        A `Spectrum`. Not-a-number Jacobians give NaN, and `converged` is false.

    Raises:
        ValueError, TypeError: if an argument is not valid, fn does not return what it
            is given, or an array is being traced.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> rotation = jnp.array([[0.6, -0.7], [0.7, 0.6]])
        >>> report = deqjax.diagnostics.spectrum(
        ...     lambda z, w: w @ z, jnp.zeros(2), rotation)
        >>> round(float(report.spectral_radius), 4), bool(report.converged.all())
        (0.922, True)

    References:
        G. W. Stewart (2002), A Krylov–Schur algorithm for large eigenproblems,
        doi:10.1137/S0895479800371529.
        Y. Saad (2011), Numerical methods for large eigenvalue problems,
        doi:10.1137/1.9781611970739.
    """
    check_count("num", num, 1)
    check_count("basis", basis, 1)
    check_count("max_restarts", max_restarts, 0)
    if mode not in ("jvp", "vjp"):
        raise ValueError(f'`mode` must be "jvp" or "vjp"; got {mode!r}.')
    z = canonical_state(fn, z, args, batch_ndim)
    found = leading(
        mode,
        fn,
        z,
        args,
        num=num,
        basis=basis,
        rtol=tolerance(rtol, z, _EIGENVALUES),
        max_restarts=max_restarts,
        key=jr.key(0) if key is None else key,
        batch_ndim=batch_ndim,
    )
    batch, real = batch_of(z, batch_ndim), flatten(z, batch_ndim).dtype
    complex_ = np.complex128 if real == jnp.float64 else np.complex64
    return Spectrum(
        eigenvalues=to_batch(found.values, batch, complex_),
        residual=to_batch(found.residual, batch, real),
        error=to_batch(found.residual * found.condition, batch, real),
        converged=to_batch(found.converged, batch),
        spectral_radius=to_batch(np.abs(found.values[:, 0]), batch, real),
        num_products=jnp.asarray(found.products, jnp.int32),
    )


class SingularValues(AbstractReport):
    """Extreme singular values of a Jacobian, as found by `singular_values`.

    Attributes:
        jacobian: σ_max(J), a bound from below.
        largest: σ_max(I − J), a bound from below.
        smallest: σ_min(I − J), a bound from above.
        condition: `largest` / `smallest`, a bound from below on the condition of I − J.
        residual: ‖Aᵀu − σ v‖₂ of the three in this order, u = A v / σ: A has a singular
            value this near, or nearer.
        converged: whether each residual is within the tolerance.
        num_products: products with J or Jᵀ taken by the slowest problem.
    """

    jacobian: Float[Array, "*batch"]
    largest: Float[Array, "*batch"]
    smallest: Float[Array, "*batch"]
    condition: Float[Array, "*batch"]
    residual: Float[Array, "*batch 3"]
    converged: Bool[Array, "*batch 3"]
    num_products: Int[Array, ""]

    def table(self) -> Table:
        batch = self.condition.shape
        values = (self.jacobian, self.largest, self.smallest)
        names = ("σ_max(J)", "σ_max(I − J)", "σ_min(I − J)")
        rows = []
        residual = np.asarray(self.residual).reshape(-1, 3)
        converged = np.asarray(self.converged).reshape(-1, 3)
        for i, problem in enumerate(problem_names(batch)):
            for k, (name, value) in enumerate(zip(names, values, strict=True)):
                row = [name, np.asarray(value).reshape(-1)[i], residual[i, k]]
                row.append(bool(converged[i, k]))
                rows.append([problem, *row] if batch else row)
        head = ["", "value", "residual", "converged"]
        worst = float(np.max(np.asarray(self.condition)))
        return Table(
            f"Singular values: the condition of I − J is at least {worst:.4g}",
            ["problem", *head] if batch else head,
            rows,
            [f"{int(self.num_products)} products with J or its transpose."],
        )

    def plot(self, ax: Any = None) -> Any:
        """The three singular values of every problem on a logarithmic axis.

        Args:
            ax: matplotlib axes; by default those of a new figure.
        """
        ax = axes(ax)
        problems = problem_names(self.condition.shape)
        for name, value, marker in (
            ("σ_max(J)", self.jacobian, "o"),
            ("σ_max(I − J)", self.largest, "^"),
            ("σ_min(I − J)", self.smallest, "v"),
        ):
            ax.plot(np.asarray(value).reshape(-1), marker, label=name)
        ax.axhline(1, color="0.6", lw=1)
        ax.set_xticks(range(len(problems)), problems)
        ax.set_yscale("log")
        ax.set_xlabel("problem of the batch")
        ax.set_ylabel("singular value")
        ax.legend(loc="best")
        return ax


def singular_values(
    fn: Callable[[Any, Any], Any],
    z: PyTree,
    args: PyTree = None,
    *,
    rtol: float | None = None,
    basis: int = 20,
    max_restarts: int = 50,
    batch_ndim: int = 0,
    key: PRNGKeyArray | None = None,
) -> SingularValues:
    r"""σ_max(J), and the extreme singular values of A = I − J, by Krylov methods.

    $$ \sigma_{\max}(J) = \lambda_{\max}(J^\top J)^{1/2}, \qquad
       \sigma_{\min}(A) = \lambda_{\max}\big((A^\top A)^{-1}\big)^{-1/2}, \qquad
       \kappa = \sigma_{\max}(A) / \sigma_{\min}(A) . $$

    Each is the leading eigenvalue of a symmetric operator, found as by
    [`spectrum`][deqjax.diagnostics.spectrum]; the inverse is applied by two solves with
    `deqjax.linear.GMRES`. The value reported is ‖A v‖ of the unit vector found, which
    bounds σ_max from below and σ_min from above, whatever has gone wrong before. So the
    condition is one from below too. Where GMRES fails, as for a singular I − J, the
    residual shows it.

    **Cost:** one linearisation per cycle; 2 products per step for the largest ones, and
    two linear solves per step for the smallest. **Memory:** `basis` + 1 states, and
    GMRES's 35.

    Args:
        fn: `fn(z, args) -> z`, differentiable in forward mode.
        z: where J is taken: a pytree of real arrays.
        args: passed to fn.
        rtol: tolerance on the residual over σ. By default 1e-3 in float32, 1e-6 in
            float64, 1e-2 in float16 and 5e-2 in bfloat16.
        basis: vectors of a cycle, at least 4.
        max_restarts: most restarts, of each.
        batch_ndim: leading axes that index independent problems.
        key: decides where the iteration starts. Default: `jax.random.key(0)`.

    Returns:
        A `SingularValues`.

    Raises:
        ValueError, TypeError: as `spectrum`.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> report = deqjax.diagnostics.singular_values(
        ...     lambda z, a: a * z, jnp.ones(3), jnp.array([0.9, 0.5, -1.0]))
        >>> round(float(report.jacobian), 3), round(float(report.condition), 2)
        (1.0, 20.0)

    References:
        G. H. Golub, C. F. Van Loan (2013), Matrix computations, 4th edition,
        section 10.4, doi:10.56021/9781421407944.
    """
    check_count("basis", basis, 1)
    check_count("max_restarts", max_restarts, 0)
    z = canonical_state(fn, z, args, batch_ndim)
    batch, real = batch_of(z, batch_ndim), flatten(z, batch_ndim).dtype
    limit = tolerance(rtol, z, SINGULAR)
    key = jr.key(0) if key is None else key
    values, residuals, products = [], [], 0
    for kind in ("gram", "shifted", "inverse"):
        vectors, count = extreme(
            kind,
            fn,
            z,
            args,
            rtol=limit,
            basis=basis,
            max_restarts=max_restarts,
            key=key,
            batch_ndim=batch_ndim,
        )
        value, residual = triplet(kind, fn, z, args, vectors, batch_ndim)
        values.append(np.asarray(value))
        residuals.append(np.asarray(residual))
        products += count + 2
    sigma, residual = np.stack(values, -1), np.stack(residuals, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        condition = sigma[:, 1] / sigma[:, 2]
    return SingularValues(
        jacobian=to_batch(sigma[:, 0], batch, real),
        largest=to_batch(sigma[:, 1], batch, real),
        smallest=to_batch(sigma[:, 2], batch, real),
        condition=to_batch(condition, batch, real),
        residual=to_batch(residual, batch, real),
        converged=to_batch(residual <= limit * sigma, batch),
        num_products=jnp.asarray(products, jnp.int32),
    )


@eqx.filter_jit
def triplet(
    kind: str, fn: Callable, z: PyTree, args: PyTree, v: Array, batch_ndim: int
) -> tuple[Array, Array]:
    """σ = ‖A v‖ and ‖Aᵀ A v − σ² v‖ / σ for unit vectors, A = J or I − J."""
    push, pull = jacobian(fn, z, args, batch_ndim)
    if kind == "gram":
        forward, backward = push, pull
    else:
        forward, backward = (lambda v: v - push(v)), (lambda v: v - pull(v))
    norm = lambda x: jnp.linalg.norm(x, axis=1)
    v = v / norm(v)[:, None]
    u = forward(v)
    sigma = norm(u)
    rest = norm(backward(u) - (sigma**2)[:, None] * v)
    return sigma, jnp.where(sigma > 0, rest / jnp.where(sigma > 0, sigma, 1), rest)
