"""Lipschitz constants from samples."""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from .._checks import check_count
from ._krylov import extreme
from ._report import AbstractReport, Table, axes, problem_names
from ._spectrum import SINGULAR, tolerance, triplet
from ._state import batch_of, canonical_state, flatten


class Mapped(eqx.Module):
    """fn for a further leading axis of states, with the same args."""

    fn: Callable

    def __call__(self, z: PyTree, args: PyTree) -> PyTree:
        return jax.vmap(self.fn, in_axes=(0, None))(z, args)


def norms_at(
    fn: Callable, points: PyTree, args: PyTree, batch_ndim: int, key: PRNGKeyArray
) -> tuple[np.ndarray, np.ndarray]:
    """σ_max(J) at every point, (points, *batch), and whether it has converged."""
    mapped, limit = Mapped(fn), tolerance(None, points, SINGULAR)
    vectors, _ = extreme(
        "gram",
        mapped,
        points,
        args,
        basis=20,
        rtol=limit,
        max_restarts=50,
        key=key,
        batch_ndim=batch_ndim + 1,
    )
    sigma, residual = triplet("gram", mapped, points, args, vectors, batch_ndim + 1)
    shape = batch_of(points, batch_ndim + 1)
    sigma, residual = (np.asarray(x).reshape(shape) for x in (sigma, residual))
    return sigma, residual <= limit * sigma


class LipschitzReport(AbstractReport):
    """Bounds from below on a Lipschitz constant, as found by `lipschitz`.

    Attributes:
        constant: the largest of all that follow: f is no contraction if it is ≥ 1.
        norms: σ_max(J) at each sample.
        converged: whether each of those meets its tolerance.
        quotient: the largest ‖f(x) − f(y)‖₂ / ‖x − y‖₂ of two samples.
    """

    constant: Float[Array, "*batch"]
    norms: Float[Array, "samples *batch"]
    converged: Bool[Array, "samples *batch"]
    quotient: Float[Array, "*batch"]

    def table(self) -> Table:
        batch = self.constant.shape
        norms = np.asarray(self.norms).reshape(len(self.norms), -1)
        good = np.asarray(self.converged).reshape(len(self.norms), -1)
        rest = [np.asarray(x).reshape(-1) for x in (self.constant, self.quotient)]
        rows = []
        for i, name in enumerate(problem_names(batch)):
            row = [rest[0][i], norms[:, i].min(), np.median(norms[:, i])]
            row += [norms[:, i].max(), rest[1][i], bool(good[:, i].all())]
            rows.append([name, *row] if batch else row)
        head = ["at least", "smallest σ", "median σ", "largest σ", "quotient"]
        head += ["converged"]
        return Table(
            f"Lipschitz constant, from {len(norms)} samples",
            ["problem", *head] if batch else head,
            rows,
        )

    def plot(self, ax: Any = None) -> Any:
        """σ_max(J) at every sample.

        Args:
            ax: matplotlib axes; by default those of a new figure.
        """
        ax = axes(ax)
        norms = np.asarray(self.norms).reshape(len(self.norms), -1)
        ax.plot(norms, "o", ms=4)
        ax.axhline(1, color="0.6", lw=1)
        ax.set_yscale("log")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel("sample")
        ax.set_ylabel("σ_max(J)")
        return ax


def lipschitz(
    fn: Callable[[Any, Any], Any],
    samples: PyTree,
    args: PyTree = None,
    *,
    batch_ndim: int = 0,
    key: PRNGKeyArray | None = None,
) -> LipschitzReport:
    r"""Bounds from below on the Lipschitz constant of fn(·, args), from samples.

    $$ L \ge \max_i \sigma_{\max}(J(z_i)), \qquad
       L \ge \max_{i \ne j} \frac{\lVert f(z_i) - f(z_j) \rVert}
                                 {\lVert z_i - z_j \rVert} . $$

    **Cost:** one evaluation per sample, and 2 products per step of a Krylov method, for
    all samples in lockstep. **Memory:** 21 copies of all samples.

    Args:
        fn: `fn(z, args) -> z`, differentiable in forward mode.
        samples: states, stacked along a new leading axis of every leaf.
        args: passed to fn, the same for all samples.
        batch_ndim: axes behind that of the samples that index independent problems.
        key: decides where the iterations start. Default: `jax.random.key(0)`.

    Returns:
        A `LipschitzReport`.

    Raises:
        ValueError, TypeError: if an argument is not valid, or an array is being traced.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> z = jnp.linspace(-1, 1, 5)[:, None]
        >>> report = deqjax.diagnostics.lipschitz(lambda z, a: jnp.sin(a * z), z, 0.9)
        >>> round(float(report.constant), 4)
        0.9
    """
    check_count("batch_ndim", batch_ndim, 0)
    samples = canonical_state(Mapped(fn), samples, args, batch_ndim + 1, "samples")
    key = jr.key(0) if key is None else key
    sigma, converged = norms_at(fn, samples, args, batch_ndim, key)
    quotient = _quotients(fn, samples, args, batch_ndim)
    dtype = quotient.dtype
    norms = jnp.asarray(sigma, dtype)
    return LipschitzReport(
        constant=jnp.maximum(jnp.max(norms, axis=0), quotient),
        norms=norms,
        converged=jnp.asarray(converged),
        quotient=quotient,
    )


@eqx.filter_jit
def _quotients(fn: Callable, samples: PyTree, args: PyTree, batch_ndim: int) -> Array:
    batch = batch_of(samples, batch_ndim + 1)
    rows = lambda z: flatten(z, batch_ndim + 1).reshape(
        batch[0], math.prod(batch[1:]), -1
    )
    x, y = rows(samples), rows(Mapped(fn)(samples, args))

    def largest(i: Array) -> Array:
        far = jnp.linalg.norm(x - x[i], axis=-1)
        moved = jnp.linalg.norm(y - y[i], axis=-1)
        return jnp.max(jnp.where(far > 0, moved / jnp.where(far > 0, far, 1), 0), 0)

    out = jax.lax.map(largest, jnp.arange(batch[0]))
    return jnp.max(out, axis=0).reshape(batch[1:])
