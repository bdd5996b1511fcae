"""Splittings: maps of which the fixed points tell monotone equilibria."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from .. import _tree
from ._checks import check_positive
from ._monotone import AbstractMonotone


class AbstractSplitting(eqx.Module):
    """A map of which the fixed points tell the solutions of z = relu(W z + U x + b)."""

    @abc.abstractmethod
    def start(self, operator: AbstractMonotone, bias: Any, z: Any) -> Any:
        """The iterate that belongs to z.

        Args:
            operator: W.
            bias: U x + b.
            z: a state.
        """

    @abc.abstractmethod
    def step(self, operator: AbstractMonotone, bias: Any, u: Any) -> Any:
        """The map. What does not depend on u is computed once per solve.

        Args:
            operator: W.
            bias: U x + b.
            u: the iterate.
        """

    @abc.abstractmethod
    def read(self, operator: AbstractMonotone, u: Any) -> Any:
        """The z that belongs to an iterate.

        Args:
            operator: W.
            u: the iterate.
        """

    @abc.abstractmethod
    def slack(self, operator: AbstractMonotone, u: Any) -> Any:
        """c with ‖relu(W z + U x + b) − z‖ ≤ c ‖step(u) − u‖ for the z of every u.

        Args:
            operator: W.
            u: an iterate, of which the shapes alone matter.
        """


class ForwardBackward(AbstractSplitting):
    r"""Forward–backward splitting.

    $$ z \mapsto \mathrm{relu}\bigl(z - \alpha\,((I - W) z - U x - b)\bigr) $$

    **Cost:** one product with W per evaluation. **Converges**, iterated by
    `deqjax.Picard`, if α < 2m / L², L = ‖I − W‖₂: with the default α = m / L² each step
    contracts by √(1 − m² / L²) or better. For larger α it may fail, visibly.

    Args:
        alpha: step size α; None: m / L², with an upper bound of L computed once per
            solve. The equilibrium does not depend on it.

    Raises:
        ValueError: if `alpha` is not positive.

    References:
        E. Winston, J. Z. Kolter (2020), Monotone operator equilibrium networks,
        doi:10.48550/arXiv.2006.08591.
    """

    alpha: float | None = None

    def __check_init__(self):
        if self.alpha is not None:
            check_positive("alpha", self.alpha)

    def start(self, operator: AbstractMonotone, bias: Any, z: Any) -> Any:
        return z

    def step(self, operator: AbstractMonotone, bias: Any, u: Any) -> Any:
        return operator.activate(
            _gradient_step(operator, bias, u, self._size(operator, u))
        )

    def read(self, operator: AbstractMonotone, u: Any) -> Any:
        return u

    def slack(self, operator: AbstractMonotone, u: Any) -> Any:
        # A projected step is the longer the larger α is, but per α the shorter.
        return 1 / jnp.minimum(self._size(operator, u), 1)

    def _size(self, operator: AbstractMonotone, u: Any) -> Any:
        if self.alpha is not None:
            return self.alpha
        bound = operator.lipschitz(_tree.zeros_like(u))
        return lax.stop_gradient(operator.m / bound**2)


class PeacemanRachford(AbstractSplitting):
    r"""Peaceman–Rachford splitting.

    $$ u \mapsto 2 V (v + \alpha (U x + b)) - v, \qquad v = 2\,\mathrm{relu}(u) - u,
       \qquad V = (I + \alpha (I - W))^{-1}, \qquad z = \mathrm{relu}(u) $$

    **Cost:** one application of V per evaluation; V, and a bound of ‖I − W‖₂ for the
    test, are made once per solve.
    **Converges**, iterated by `deqjax.Picard`, for every α > 0, since m > 0; fastest
    near α = 1 / ‖I − W‖₂. With `Picard(beta=0.5)` it is Douglas–Rachford splitting.

    Args:
        alpha: step size α. The equilibrium does not depend on it.

    Raises:
        ValueError: if `alpha` is not positive.

    References:
        E. Winston, J. Z. Kolter (2020), Monotone operator equilibrium networks,
        doi:10.48550/arXiv.2006.08591.
    """

    alpha: float = 1.0

    def __check_init__(self):
        check_positive("alpha", self.alpha)

    def start(self, operator: AbstractMonotone, bias: Any, z: Any) -> Any:
        # For an equilibrium z this is the fixed point.
        return _gradient_step(operator, bias, z, self.alpha)

    def step(self, operator: AbstractMonotone, bias: Any, u: Any) -> Any:
        resolvent = operator.resolvent(self.alpha, _tree.zeros_like(u))
        reflect = lambda a, b: 2 * a - b
        v = jax.tree.map(reflect, operator.activate(u), u)
        shifted = jax.tree.map(lambda a, b: a + self.alpha * b, v, bias)
        return jax.tree.map(reflect, resolvent(shifted), v)

    def read(self, operator: AbstractMonotone, u: Any) -> Any:
        return operator.activate(u)

    def slack(self, operator: AbstractMonotone, u: Any) -> Any:
        # With w = V (v + α (U x + b)) and g = (I − W) · − U x − b, the map moves u by
        # 2 (w − z), and u − z + α g(z) = z − w + α (g(z) − g(w)).
        bound = operator.lipschitz(_tree.zeros_like(u))
        return lax.stop_gradient((1 / self.alpha + bound) / 2)


def _gradient_step(operator: AbstractMonotone, bias: Any, z: Any, alpha: Any) -> Any:
    """z − α ((I − W) z − bias)."""
    return jax.tree.map(
        lambda a, wa, b: a + _cast(alpha, a) * (wa - a + b),
        z,
        operator.multiply(z),
        bias,
    )


def _cast(alpha: Any, like: Array) -> Any:
    return alpha.astype(like.dtype) if isinstance(alpha, Array) else alpha
