"""Networks that generate the weights of others, and equilibria of generated cells."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._tree import wide
from ..solvers._optimistix import AnySolver
from ._checks import check_positive, check_sizes
from ._deq import DEQ


class HyperNetwork(eqx.Module):
    r"""Generates the weights of any equinox module from a context.

    $$ \theta(c) = \theta_0 + V\, h(c) $$

    | symbol | meaning |
    |---|---|
    | $c$ | context, a vector |
    | $\theta(c)$ | the generated arrays of the module, one after the other |
    | $\theta_0$ | those of `template`: what all contexts share; trained as well |
    | $h$ | a perceptron with `rank` outputs |
    | $V$ | a matrix with a column for each of them |

    At first V h is at most about `scale` times as large as each of θ₀'s arrays (where
    every |hᵢ| is 1; for contexts of unit size about a fifth of that), so that generated
    modules start as the template does, each a little different; arrays of zeros, such
    as biases, start as zeros. (A last layer of common initialisation would make weights
    of a size that has nothing to do with the module's own.)

    An array that the template holds in several places (a tied weight) is generated
    once.

    **Memory:** `rank` + 1 numbers for each that is generated: with n of them, rank · n
    in V.

    **Differences from the source:** Ha, Dai and Le generate each layer's weights from
    an embedding of the layer; here one context generates all of a module's.

    Args:
        template: the module; called as `hypernetwork(context)`, its structure comes
            back with other arrays.
        context_size: length of c.
        rank: length of h(c).
        width: of the perceptron's hidden layers.
        depth: how many hidden layers.
        scale: see above.
        where: `where(leaf)` is whether to generate a leaf; the others are θ₀'s for
            every context. Must choose floating-point arrays.
        key: decides the initial parameters.

    Raises:
        TypeError, ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, equinox as eqx, jax, jax.numpy as jnp
        >>> key1, key2 = jax.random.split(jax.random.key(0))
        >>> template = eqx.nn.Linear(3, 2, key=key1)
        >>> hyper = deqjax.nn.HyperNetwork(template, 4, key=key2)
        >>> hyper(jnp.ones(4))(jnp.ones(3)).shape
        (2,)

    References:
        D. Ha, A. Dai, Q. V. Le (2016), HyperNetworks, doi:10.48550/arXiv.1609.09106.
    """

    template: Any
    features: eqx.nn.MLP
    V: tuple[Float[Array, "_ rank"], ...]
    where: Callable[[Any], bool] = eqx.field(static=True)
    ties: tuple[int, ...] = eqx.field(static=True)

    def __init__(
        self,
        template: Any,
        context_size: int,
        *,
        rank: int = 8,
        width: int = 32,
        depth: int = 1,
        scale: float = 0.1,
        where: Callable[[Any], bool] = eqx.is_inexact_array,
        key: PRNGKeyArray,
    ):
        check_sizes(context_size=context_size, rank=rank, width=width, depth=depth)
        check_positive("scale", scale)
        chosen = [leaf for leaf in jtu.tree_leaves(template) if where(leaf)]
        if not chosen:
            raise ValueError(
                "`template` must have arrays to generate; `where` chooses none of the "
                f"leaves of {type(template).__name__}."
            )
        for leaf in chosen:
            if not (eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)):
                raise TypeError(
                    "`where` must choose real floating-point arrays alone; it chooses "
                    f"{eqx.tree_pformat(leaf)}."
                )
        # One array in two places is two leaves, and after a transformation two arrays.
        distinct = list({id(leaf): leaf for leaf in chosen}.values())
        places = {id(leaf): i for i, leaf in enumerate(distinct)}
        self.ties = tuple(places[id(leaf)] for leaf in chosen)
        dtype = max((wide(a.dtype) for a in distinct), key=lambda d: d.itemsize)
        key1, key2 = jr.split(key)
        self.template = template
        self.where = where
        self.features = eqx.nn.MLP(
            context_size,
            rank,
            width,
            depth,
            final_activation=jnp.tanh,
            dtype=dtype,
            key=key1,
        )
        self.V = tuple(
            _column(leaf, rank, scale, k)
            for leaf, k in zip(distinct, jr.split(key2, len(distinct)), strict=True)
        )

    def __call__(self, context: Array) -> Any:
        """The module that belongs to a context.

        For several, `jax.vmap` the function that makes the module and calls it.

        Args:
            context: a vector of length `context_size`, real and floating-point.
        """
        size = self.features.in_size
        if jnp.shape(context) != (size,):
            raise ValueError(
                f"`context` must have shape ({size},); got {jnp.shape(context)}. For a "
                "batch of contexts use `jax.vmap`."
            )
        if not jnp.issubdtype(jnp.result_type(context), jnp.floating):
            raise TypeError(
                "`context` must be real and floating-point; got "
                f"{jnp.result_type(context)}. Cast it."
            )
        h = self.features(context.astype(self.features.layers[0].weight.dtype))
        ties, made = iter(self.ties), []

        def generate(leaf: Any) -> Any:
            if not self.where(leaf):
                return leaf
            i = next(ties)
            if i == len(made):
                change = (self.V[i] @ h.astype(self.V[i].dtype)).reshape(leaf.shape)
                made.append(leaf + change.astype(leaf.dtype))
            return made[i]

        return jtu.tree_map(generate, self.template)


class HyperDEQ(eqx.Module):
    r"""A deep equilibrium layer whose cell is generated from a context.

    $$ z^* = f_{\theta(c)}(z^*, x) $$

    The weights are generated once per solve. One task at a time: `jax.vmap` over
    contexts solves one problem per task, each with its own weights.

    Args:
        hyper: a `HyperNetwork` of a cell, as `deqjax.nn.DEQ` takes it; or any function
            from contexts to cells.
        solver: see `deqjax.fixed_point`, whose default is used: which one serves a cell
            best depends on the cell.
        adjoint: see `deqjax.fixed_point`.
        max_steps: see `deqjax.fixed_point`.

    Raises:
        TypeError, ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, equinox as eqx, jax, jax.numpy as jnp
        >>> f = lambda w, z, x, key=None: jnp.tanh(w * z + x)
        >>> cell = eqx.Partial(f, jnp.ones(3))
        >>> hyper = deqjax.nn.HyperNetwork(cell, 2, key=jax.random.key(0))
        >>> deqjax.nn.HyperDEQ(hyper)(jnp.ones(3), jnp.ones(2)).shape
        (3,)

    References:
        D. Ha, A. Dai, Q. V. Le (2016), HyperNetworks, doi:10.48550/arXiv.1609.09106.
    """

    hyper: Any
    solver: AnySolver | None = eqx.field(default=None, kw_only=True)
    adjoint: optx.AbstractAdjoint | None = eqx.field(default=None, kw_only=True)
    max_steps: int = eqx.field(default=64, kw_only=True, static=True)

    def __check_init__(self):
        if not callable(self.hyper):
            raise TypeError(
                "`hyper` must be callable as hyper(context) -> cell; got "
                f"{type(self.hyper).__name__}."
            )
        check_sizes(max_steps=self.max_steps)

    def __call__(
        self,
        x: PyTree,
        context: Any,
        *,
        z0: PyTree = None,
        key: PRNGKeyArray | None = None,
        max_steps: int | None = None,
    ) -> PyTree:
        """The fixed point of the cell that belongs to a context.

        Args:
            x: see `deqjax.nn.DEQ`.
            context: what the cell is generated from.
            z0: see `deqjax.nn.DEQ`.
            key: see `deqjax.nn.DEQ`.
            max_steps: in place of the layer's own.
        """
        return self.solve(x, context, z0=z0, key=key, max_steps=max_steps).value

    def solve(
        self,
        x: PyTree,
        context: Any,
        *,
        z0: PyTree = None,
        key: PRNGKeyArray | None = None,
        max_steps: int | None = None,
        throw: bool = False,
        options: dict[str, Any] | None = None,
    ) -> optx.Solution:
        """As `__call__`, with all that `deqjax.fixed_point` returns.

        Args:
            x: see `__call__`.
            context: see there.
            z0: see there.
            key: see there.
            max_steps: see there.
            throw: see `deqjax.fixed_point`.
            options: see there.
        """
        return self.deq(context).solve(
            x, z0=z0, key=key, max_steps=max_steps, throw=throw, options=options
        )

    def deq(self, context: Any) -> DEQ:
        """The equilibrium layer that belongs to a context."""
        return DEQ(
            self.hyper(context),
            solver=self.solver,
            adjoint=self.adjoint,
            max_steps=self.max_steps,
        )


def _column(leaf: Array, rank: int, scale: float, key: PRNGKeyArray) -> Array:
    """Columns that make changes `scale` times as large as the leaf, for |h| ≤ 1."""
    dtype = wide(leaf.dtype)
    size = jnp.sqrt(jnp.mean(jnp.square(leaf.astype(dtype)))) if leaf.size else 0.0
    unit = jr.normal(key, (leaf.size, rank), dtype) / rank**0.5
    return scale * size * unit
