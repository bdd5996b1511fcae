"""The record of a backward pass, carried out of it as a gradient."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float


class BackwardStats(eqx.Module):
    """A probe whose "gradient" says how the backward pass went.

    Give it to an adjoint (`ImplicitAdjoint(probe=probe)`) and differentiate with
    respect to it too: the cotangent of the probe is the record. Nothing calls back to
    the host, and without a probe nothing is computed for it. The values that the
    probe itself holds do not matter.

    Give every solve its own probe; a probe used twice collects the sum. Under
    `jax.vmap` map over a probe of shape `(n,)`: an unbatched one gets the sum over the
    lanes, as every unbatched input does.

    Attributes:
        residual: ‖b − A λ‖₂ of the adjoint system that was solved.
        relative_residual: that over ‖b‖₂.
        num_products: vector–Jacobian products of the linear solve.
        converged: 1 if the tolerance was met, else 0.
        drift: of a reversible pass: largest difference between the start that the
            reconstruction arrives at and the known one.
        repair: of a reversible pass: the largest repair as a part of the capacity of
            the recorded bits. Near 1, states may be lost; the drift tells if any was.
        forward_residual: ‖f(z*) − z*‖₂ where f was linearised: how far from a fixed
            point the formulas that hold at one were evaluated.

    What does not apply to an adjoint is NaN, at which `jax_debug_nans` stops: give no
    probe under it. Problems of a batch go in step, and so do the lanes of a `jax.vmap`:
    `num_products` is that of the slowest.

    Args:
        batch_shape: shape of each entry; with `()` a batched solve reports the
            worst residuals and drift, and `converged` only if every problem is.

    Example:
        >>> import deqjax, jax, jax.numpy as jnp
        >>> def loss(a, probe):
        ...     adjoint = deqjax.ImplicitAdjoint(probe=probe)
        ...     f = lambda z, a: jnp.cos(a * z)
        ...     return deqjax.fixed_point(f, jnp.ones(()), a, adjoint=adjoint,
        ...         solver=deqjax.Picard()).value
        >>> g, stats = jax.grad(loss, argnums=(0, 1))(0.5, deqjax.BackwardStats())
        >>> float(stats.converged), float(stats.num_products)
        (1.0, 2.0)
    """

    residual: Float[Array, "*batch"]
    relative_residual: Float[Array, "*batch"]
    num_products: Float[Array, "*batch"]
    converged: Float[Array, "*batch"]
    drift: Float[Array, "*batch"]
    repair: Float[Array, "*batch"]
    forward_residual: Float[Array, "*batch"]

    def __init__(self, batch_shape: tuple[int, ...] = ()):
        zeros = jnp.zeros(batch_shape, jnp.float32)
        self.residual = zeros
        self.relative_residual = zeros
        self.num_products = zeros
        self.converged = zeros
        self.drift = zeros
        self.repair = zeros
        self.forward_residual = zeros

    def __repr__(self):
        entries = ", ".join(
            f"{name}={_entry(value)}" for name, value in vars(self).items()
        )
        return f"{type(self).__name__}({entries})"

    def record(
        self,
        *,
        residual: Array | None = None,
        relative_residual: Array | None = None,
        num_products: Array | None = None,
        converged: Array | None = None,
        drift: Array | None = None,
        repair: Array | None = None,
        forward_residual: Array | None = None,
    ) -> "BackwardStats":
        """The cotangent of this probe: the given entries, NaN for the others."""

        def fit(value: Array | None, like: Array, reduce: Callable) -> Array:
            if value is None:
                return jnp.full_like(like, jnp.nan)
            entry = jnp.asarray(value).astype(like.dtype)
            if like.ndim == 0 and entry.ndim > 0:
                entry = reduce(entry)
            shapes = zip(entry.shape[::-1], like.shape[::-1], strict=False)
            if entry.ndim > like.ndim or any(n not in (1, m) for n, m in shapes):
                raise ValueError(
                    f"`probe` has batch_shape {like.shape}, but the solve has problems "
                    f"of shape {entry.shape}. Use `BackwardStats({entry.shape})`, or "
                    "`BackwardStats()` for the worst of all."
                )
            return jnp.broadcast_to(entry, like.shape)

        worst = lambda v: jnp.max(v, initial=0.0)
        least = lambda v: jnp.min(v, initial=1.0)
        leaves = [
            fit(residual, self.residual, worst),
            fit(relative_residual, self.relative_residual, worst),
            fit(num_products, self.num_products, worst),
            fit(converged, self.converged, least),
            fit(drift, self.drift, worst),
            fit(repair, self.repair, worst),
            fit(forward_residual, self.forward_residual, worst),
        ]
        return jtu.tree_unflatten(jtu.tree_structure(self), leaves)


def _entry(value: Any) -> str:
    """The numbers of an array that has some, else its shape and dtype."""
    known = isinstance(value, Array | np.ndarray) and not isinstance(value, Tracer)
    if not known or value.size > _SHOWN:
        return eqx.tree_pformat(value, struct_as_array=True)
    try:
        numbers = np.asarray(value)
    except RuntimeError:  # deleted, donated to a computation, or on other hosts
        return eqx.tree_pformat(value)
    return np.array2string(
        numbers, separator=", ", formatter={"all": lambda x: f"{x:.4g}"}
    )


# Most entries of an array that are printed one by one.
_SHOWN = 16


def check_probe(probe: Any) -> None:
    """Raise unless `probe` is one, or None."""
    if probe is not None and not isinstance(probe, BackwardStats):
        raise TypeError(
            "`probe` must be a deqjax.BackwardStats or None; got "
            f"{type(probe).__name__}."
        )
