"""What changes from training step to training step."""

from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import PRNGKeyArray

from .._checks import canonical_weights
from .._types import Options
from ..adjoints import UnrolledAdjoint
from ..solvers import Picard
from ._checks import check_count, check_sizes
from ._deq import DEQ
from ._hyper import HyperDEQ
from ._monotone_deq import MonotoneDEQ


def draw_options(
    deq: DEQ,
    key: PRNGKeyArray,
    *,
    steps: Sequence[int] = (),
    betas: Sequence[float] = (),
) -> Options:
    """Options of a solve with a depth, and a weight β on the cell, drawn at random.

    They are traced values, so that no draw compiles anything again. A model trained so
    can be used at many depths.

    Args:
        deq: the layer.
        key: decides the draw.
        steps: the depths to draw from, at most the layer's `max_steps`; none: the depth
            is not drawn.
        betas: the weights to draw from, for a layer with a `deqjax.Reversible` solver;
            none: the weight is not drawn.

    Returns:
        What `deq.solve(x, options=…)` takes.

    Raises:
        ValueError: if a depth or a weight is not possible, or there is nothing to draw.

    Example:
        >>> import deqjax, jax.numpy as jnp, jax.random as jr
        >>> cell = lambda z, x, key=None: jnp.tanh(0.5 * z + x)
        >>> deq = deqjax.nn.RevDEQ(cell, num_steps=10)
        >>> options = deqjax.nn.draw_options(
        ...     deq, jr.key(0), steps=(4, 6, 10), betas=(0.3, 0.5, 0.7))
        >>> deq(jnp.ones(3), options=options).shape, sorted(options)
        ((3,), ['beta', 'step_budget'])
    """
    for number in steps:
        check_count("steps", number, 1)
        if number > deq.max_steps:
            raise ValueError(
                f"`steps` may not exceed the layer's `max_steps` = {deq.max_steps}; "
                f"got {tuple(steps)}."
            )
    key1, key2 = jr.split(key)
    options: dict[str, Any] = {}
    if betas:
        if "beta" not in getattr(deq.solver, "known_options", ()):
            raise ValueError(
                "`betas` are for a layer whose solver is `deqjax.Reversible`; got "
                f"{type(deq.solver).__name__}."
            )
        weights = canonical_weights("`betas`", jnp.asarray(tuple(betas), float))
        options["beta"] = jr.choice(key1, weights)
    if steps:
        options["step_budget"] = jr.choice(key2, jnp.asarray(tuple(steps), jnp.int32))
    if not options:
        raise ValueError("There is nothing to draw: give `steps`, or `betas`.")
    return options


class _Undamped(Picard):
    """Picard iteration of static length; it leaves a β that was drawn unused."""

    known_options: ClassVar[frozenset[str]] = Picard.known_options | {"beta"}


def unrolled(model: Any, num_steps: int) -> Any:
    """The model with every equilibrium in it a network of `num_steps` layers.

    Undamped steps of the cell, or of a `MonotoneDEQ`'s splitting, differentiated by
    backpropagation through them. What `draw_options` drew for the model is taken: a β
    is not used, a `step_budget` is where it is below `num_steps`.

    Apply it inside of the loss, so that parameters, gradients and the optimiser's state
    keep the structure that they have for the model itself.

    Args:
        model: any pytree with `DEQ`s, `HyperDEQ`s or `MonotoneDEQ`s.
        num_steps: evaluations of each cell.

    Returns:
        The model, with the same parameters.

    Raises:
        ValueError: if `num_steps` is not a positive integer, or there is no such layer.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> deq = deqjax.nn.DEQ(lambda z, x, key=None: 0.5 * z + x)
        >>> float(deqjax.nn.unrolled(deq, 2)(jnp.array(1.0)))
        1.5
    """
    check_sizes(num_steps=num_steps)
    is_deq = lambda node: isinstance(node, DEQ | HyperDEQ | MonotoneDEQ)
    found = 0

    def leaf(node: Any) -> Any:
        nonlocal found
        if not is_deq(node):
            return node
        found += 1
        batch_ndim = getattr(node.solver, "batch_ndim", 0)
        settings: dict[str, Any] = {
            "solver": _Undamped(None, None, batch_ndim=batch_ndim),
            "adjoint": UnrolledAdjoint(),
            "max_steps": num_steps,
        }
        if isinstance(node, HyperDEQ):
            return HyperDEQ(node.hyper, **settings)
        if isinstance(node, MonotoneDEQ):
            return MonotoneDEQ(node.operator, splitting=node.splitting, **settings)
        return DEQ(node.cell, start=node.start, **settings)

    model = jax.tree.map(leaf, model, is_leaf=is_deq)
    if not found:
        raise ValueError(
            "`model` has no equilibrium layer of `deqjax.nn` to unroll; got "
            f"{type(model).__name__}."
        )
    return model


class Pretraining(eqx.Module):
    """Training that unrolls first, and solves then.

    For the first `num_updates` updates a model's equilibria are replaced by
    `unrolled(model, depth)`, which is cheap and moves the weights to where solves
    converge.

    Two programs are compiled, one for each phase: call it outside of `jax.jit`, or with
    the update's number static.

    Args:
        num_updates: updates of the first phase.
        depth: evaluations of each cell in it.

    Raises:
        ValueError: if an argument is not a positive integer.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> deq = deqjax.nn.DEQ(lambda z, x, key=None: 0.5 * z + x)
        >>> phase = deqjax.nn.Pretraining(num_updates=100, depth=2)
        >>> [round(float(phase(deq, i)(jnp.array(1.0))), 2) for i in (99, 100)]
        [1.5, 2.0]

    References:
        S. Bai, J. Z. Kolter, V. Koltun (2019), Deep equilibrium models,
        doi:10.48550/arXiv.1909.01377.
    """

    num_updates: int = eqx.field(static=True)
    depth: int = eqx.field(default=2, static=True)

    def __check_init__(self):
        check_sizes(num_updates=self.num_updates, depth=self.depth)

    def __call__(self, model: Any, update: Any) -> Any:
        """The model for an update.

        Args:
            model: see `unrolled`.
            update: its number, from 0, a Python integer.
        """
        if not isinstance(update, int):
            raise TypeError(
                "`update` must be a Python integer, since the two phases are two "
                f"programs; got {type(update).__name__}. Choose the phase outside of "
                "`jax.jit`."
            )
        return unrolled(model, self.depth) if update < self.num_updates else model
