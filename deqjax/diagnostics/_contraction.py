"""Whether a map is a contraction, where, and what that means for plain iteration."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .. import _tree
from .._checks import check_count
from ._lipschitz import norms_at
from ._report import AbstractReport, Table, axes, problem_names
from ._spectrum import spectrum
from ._state import batch_of, canonical_state, to_batch


class ContractionReport(AbstractReport):
    """Whether and how fast plain iteration contracts; see `contraction_report`.

    Attributes:
        spectral_radius: ρ(J) at z: the asymptotic rate of plain iteration.
        norm: σ_max(J) at z: below 1, one step contracts every small difference.
        lipschitz: the largest σ_max(J) at z and at the samples around it, a bound from
            below on the Lipschitz constant of f on the ball.
        radius: of the ball, in the 2-norm.
        residual: ‖f(z) − z‖₂: whether z is a fixed point.
        rate_known: whether the eigenvalue behind `spectral_radius` has converged.
        norm_known: whether all singular values behind `lipschitz` have converged.
        steps: Picard steps that reduce an error by `reduction` at the rate ρ, not
            counting a transient; inf where ρ ≥ 1.
        steps_bound: the same at the rate `lipschitz`: enough steps from anywhere in a
            ball on which that is the Lipschitz constant; inf where it is ≥ 1.
        reduction: the factor that `steps` are for.
    """

    spectral_radius: Float[Array, "*batch"]
    norm: Float[Array, "*batch"]
    lipschitz: Float[Array, "*batch"]
    radius: Float[Array, "*batch"]
    residual: Float[Array, "*batch"]
    rate_known: Bool[Array, "*batch"]
    norm_known: Bool[Array, "*batch"]
    steps: Float[Array, "*batch"]
    steps_bound: Float[Array, "*batch"]
    reduction: Float[Array, ""]

    @property
    def verdicts(self) -> list[str]:
        """One sentence per problem of the batch."""
        columns = (self.spectral_radius, self.norm, self.lipschitz)
        known = np.asarray(self.rate_known & self.norm_known).reshape(-1)
        rate, norm, ball = (np.asarray(c).reshape(-1).tolist() for c in columns)
        rows = zip(rate, norm, ball, known.tolist(), strict=True)
        return [_verdict(*row) for row in rows]

    def table(self) -> Table:
        batch = self.norm.shape
        columns = [
            np.asarray(x).reshape(-1)
            for x in (
                self.spectral_radius,
                self.norm,
                self.lipschitz,
                self.radius,
                self.residual,
                self.steps,
                self.steps_bound,
            )
        ]
        names = problem_names(batch)
        verdicts = self.verdicts
        rows = []
        for i, name in enumerate(names):
            row = [c[i] for c in columns] + [verdicts[i]]
            rows.append([name, *row] if batch else row)
        head = ["ρ(J)", "σ_max(J)", "in the ball", "its radius", "residual"]
        head += ["steps", "steps, bound", "verdict"]
        note = (
            "Steps of Picard iteration that reduce an error by the factor "
            f"{float(self.reduction):.3g}: at the rate ρ, and at that of the ball."
        )
        return Table("Contraction", ["problem", *head] if batch else head, rows, [note])

    def plot(self, ax: Any = None) -> Any:
        """The errors that the two rates predict for plain iteration.

        Args:
            ax: matplotlib axes; by default those of a new figure.
        """
        ax = axes(ax)
        rate, bound = (
            float(np.max(np.asarray(x))) for x in (self.spectral_radius, self.lipschitz)
        )
        longest = float(np.max(np.asarray(self.steps)))
        steps = np.arange(int(min(longest, 200)) + 2 if math.isfinite(longest) else 50)
        for value, style, name in (
            (rate, "-", f"at the rate ρ(J) = {rate:.3g}"),
            (bound, "--", f"at σ_max in the ball, {bound:.3g}"),
        ):
            error = np.where(steps * np.log10(max(value, 1e-30)) < 30, 1.0, np.nan)
            ax.plot(steps, error * np.minimum(value**steps, 1e30), style, label=name)
        ax.axhline(float(self.reduction), color="0.6", lw=1, label="reduction")
        ax.set_yscale("log")
        ax.set_ylim(bottom=float(self.reduction) / 10)
        ax.set_xlabel("Picard steps")
        ax.set_ylabel("error relative to the start")
        ax.legend(loc="best")
        return ax


def _verdict(rate: float, norm: float, lipschitz: float, known: bool) -> str:
    if not (math.isfinite(rate) and math.isfinite(lipschitz)):
        return "the Jacobian is not finite"
    if not known:
        return "not known: a value has not converged"
    if rate >= 1:
        return "plain iteration does not converge to z"
    if norm >= 1:
        return "converges near z, but errors may grow at first"
    if lipschitz >= 1:
        return "contracts at z, not in the whole ball"
    return "contracts in the ball, as far as sampled"


def contraction_report(
    fn: Callable[[Any, Any], Any],
    z: PyTree,
    args: PyTree = None,
    *,
    reduction: float = 1e-4,
    radius: float | None = None,
    num_samples: int = 4,
    batch_ndim: int = 0,
    key: PRNGKeyArray | None = None,
) -> ContractionReport:
    r"""Whether fn is contractive at z and around it, and how fast Picard converges.

    $$ \lVert z_k - z^* \rVert \sim \rho(J)^k, \qquad
       \lVert f(x) - f(y) \rVert \le
       \max_{\xi \in [x, y]} \sigma_{\max}(J(\xi))\, \lVert x - y \rVert . $$

    ρ < 1 decides whether plain iteration converges from near z. σ_max < 1 is stronger:
    every step reduces the error in the 2-norm. Between the two lie the non-normal maps,
    whose errors grow before they fall. The samples are drawn uniformly in direction at
    distances up to `radius`; the largest σ_max among them is a bound from below on the
    Lipschitz constant, so it can show that a map is no contraction, but not prove that
    it is one.

    **Cost:** as `spectrum`, and for σ_max at each sample, all of them in lockstep, 2
    products per step.

    Args:
        fn: `fn(z, args) -> z`, differentiable in forward mode.
        z: the fixed point, a pytree of real arrays.
        args: passed to fn.
        reduction: the factor by which Picard iteration is to reduce an error, for
            `steps` and `steps_bound`.
        radius: of the ball, in the 2-norm of a problem's state. Default: a tenth of
            ‖z‖, and 0.1 for z = 0.
        num_samples: points drawn in the ball; 0 for z alone.
        batch_ndim: leading axes that index independent problems.
        key: decides the samples and where iterations start. Default:
            `jax.random.key(0)`.

    Returns:
        A `ContractionReport`.

    Raises:
        ValueError, TypeError: if an argument is not valid, or an array is being traced.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> report = deqjax.diagnostics.contraction_report(
        ...     lambda z, a: 0.5 * jnp.sin(z), jnp.zeros(3))
        >>> round(float(report.spectral_radius), 3), int(report.steps), report.verdicts
        (0.5, 14, ['contracts in the ball, as far as sampled'])

    References:
        J. M. Ortega, W. C. Rheinboldt (2000), Iterative solution of nonlinear equations
        in several variables, doi:10.1137/1.9780898719468.
    """
    if not (isinstance(reduction, float) and 0 < reduction < 1):
        raise ValueError(f"`reduction` must be a number in (0, 1); got {reduction!r}.")
    if radius is not None and not (isinstance(radius, int | float) and radius > 0):
        raise ValueError(f"`radius` must be a positive number; got {radius!r}.")
    check_count("num_samples", num_samples, 0)
    z = canonical_state(fn, z, args, batch_ndim)
    batch = batch_of(z, batch_ndim)
    key = jr.key(0) if key is None else key
    eigen = spectrum(fn, z, args, num=2, batch_ndim=batch_ndim, key=key)
    size = _tree.norm(z, batch_ndim)
    if radius is None:
        ball = jnp.where(size > 0, 0.1 * size, 0.1)
    else:
        ball = jnp.full_like(size, radius)
    points, residual = _sample(fn, z, args, ball, num_samples, key, batch_ndim)
    sigma, known = norms_at(fn, points, args, batch_ndim, key)
    lipschitz = np.asarray(np.max(sigma, axis=0))
    rate = np.asarray(eigen.spectral_radius)
    real = size.dtype
    return ContractionReport(
        spectral_radius=eigen.spectral_radius,
        norm=jnp.asarray(sigma[0], real),
        lipschitz=jnp.asarray(lipschitz, real),
        radius=ball,
        residual=residual,
        rate_known=eigen.converged[..., 0],
        norm_known=jnp.asarray(np.all(known, axis=0)),
        steps=to_batch(_steps(rate, reduction).reshape(-1), batch, real),
        steps_bound=to_batch(_steps(lipschitz, reduction).reshape(-1), batch, real),
        reduction=jnp.asarray(reduction, real),
    )


def _steps(rate: np.ndarray, reduction: float) -> np.ndarray:
    """⌈log reduction / log rate⌉, at least 1."""
    rate = rate.astype(np.float64)
    inside = (rate > 0) & (rate < 1)
    with np.errstate(divide="ignore"):
        steps = np.ceil(np.log(reduction) / np.log(np.where(inside, rate, 0.5)))
    steps = np.where(inside, np.maximum(steps, 1), np.where(rate == 0, 1, np.inf))
    return np.where(np.isnan(rate), np.nan, steps)


@eqx.filter_jit
def _sample(
    fn: Callable,
    z: PyTree,
    args: PyTree,
    radius: Array,
    num: int,
    key: PRNGKeyArray,
    batch_ndim: int,
) -> tuple[PyTree, Array]:
    """z and points of the ball around it, stacked, and ‖f(z) − z‖."""

    def point(key: PRNGKeyArray) -> PyTree:
        direction, distance = jr.split(key)
        v = _tree.draw(jr.normal, direction, z)
        size = _tree.norm(v, batch_ndim)
        length = radius * jr.uniform(distance, radius.shape, radius.dtype)
        v = _tree.scale(length / jnp.where(size > 0, size, 1), v)
        return jtu.tree_map(lambda a, b: a + b, z, v)

    first = jtu.tree_map(lambda a: a[None], z)
    residual = _tree.norm(_tree.subtract(fn(z, args), z), batch_ndim)
    if num == 0:
        return first, residual
    points = jax.vmap(point)(jr.split(key, num))
    both = jtu.tree_map(lambda a, b: jnp.concatenate([a, b]), first, points)
    return both, residual
