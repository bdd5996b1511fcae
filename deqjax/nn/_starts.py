"""Where solves start: learned, noisy, or at the equilibrium of the frame before."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import optimistix as optx
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree

from .. import _tree
from ._checks import check_count, check_list
from ._deq import DEQ


class LearnedStart(eqx.Module):
    """A start that is a parameter, the same for every input.

    Under `deqjax.ReversibleAdjoint` and `deqjax.UnrolledAdjoint` it is trained through
    the solve. Under the implicit adjoints its gradient is zero, as the equilibrium does
    not depend on it: train it with `deqjax.regularise.start_penalty`.

    Args:
        shape: of one problem's iterate.
        batch_ndim: leading axes of x that index problems; the start is repeated
            along them.

    Raises:
        ValueError: if `shape` or `batch_ndim` is not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> start = deqjax.nn.LearnedStart((3,), batch_ndim=1)
        >>> start(jnp.ones((2, 7))).shape
        (2, 3)
    """

    value: Array
    batch_ndim: int = eqx.field(static=True)

    def __init__(self, shape: tuple[int, ...], *, batch_ndim: int = 0):
        check_count("batch_ndim", batch_ndim, 0)
        shape = check_list("shape", shape) if shape != () else ()
        self.value = jnp.zeros(shape)
        self.batch_ndim = batch_ndim

    def __call__(self, x: Any, *, key: PRNGKeyArray | None = None) -> Array:
        """The start for x: an array, or a pytree of arrays with the same batch."""
        first = jtu.tree_leaves(x)[0]
        zeros = _tree.zeros_for(first, self.value.shape, self.batch_ndim)
        return zeros.astype(self.value.dtype) + self.value


class NoisyStart(eqx.Module):
    """Normal noise around another start, so that solves do not always begin alike.

    Without a key, or in inference mode, there is no noise.

    Args:
        start: `start(x, *, key=None) -> z0`; None: zeros like x.
        scale: standard deviation of the noise.
        inference: whether to leave the noise out; see `equinox.nn.inference_mode`.

    Raises:
        ValueError: if `scale` is negative.

    Example:
        >>> import deqjax, jax.numpy as jnp, jax.random as jr
        >>> start = deqjax.nn.NoisyStart(scale=0.1)
        >>> bool((start(jnp.ones(3), key=jr.key(0)) != 0).all())
        True
    """

    start: Any
    scale: float
    inference: bool

    def __init__(
        self, start: Any = None, *, scale: float = 1.0, inference: bool = False
    ):
        if isinstance(scale, int | float) and not scale >= 0:
            raise ValueError(f"`scale` must be ≥ 0; got {scale!r}.")
        self.start, self.scale, self.inference = start, scale, inference

    def __call__(self, x: Any, *, key: PRNGKeyArray | None = None) -> PyTree:
        """The start for x."""
        z0 = _tree.zeros_like(x) if self.start is None else self.start(x)
        if key is None or self.inference:
            return z0
        # A stream of its own: the cell gets the same key.
        noise = _tree.draw(jr.normal, jr.fold_in(key, 0x57A27), z0)
        return jtu.tree_map(lambda a, b: a + self.scale * b, z0, noise)


def solve_stream(
    deq: DEQ,
    frames: PyTree,
    *,
    z0: PyTree = None,
    key: PRNGKeyArray | None = None,
    carry_gradient: bool = False,
    options: dict[str, Any] | None = None,
) -> tuple[PyTree, dict[str, Any]]:
    r"""Equilibria of a stream of inputs, each solve starting at the one before.

    $$ z^*_t = \mathrm{cell}(z^*_t, x_t), \qquad z^{(0)}_t = z^*_{t-1} $$

    One `lax.scan` over the frames, with one key for all: the same masks throughout. A
    problem whose equilibrium is not finite begins anew in the next frame.

    Args:
        deq: the layer.
        frames: x_t along the first axis of every leaf.
        z0: the start of the first frame; None: the layer's own.
        key: passed to the layer at every frame.
        carry_gradient: whether gradients reach the frames before through the start.
            They are zero in any case under the implicit adjoints. By default the
            equilibrium that is carried is stopped.
        options: see `deqjax.fixed_point`.

    Returns:
        The equilibria, and the statistics of the solves, both along a first axis.

    Raises:
        ValueError: if the frames do not have the same length, or there are none.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> cell = lambda z, x, key=None: jnp.tanh(0.5 * z + x)
        >>> deq = deqjax.nn.DEQ(cell, solver=deqjax.Picard())
        >>> z, stats = deqjax.nn.solve_stream(deq, jnp.ones((3, 2)))
        >>> z.shape, stats["num_steps"].tolist()  # the same frame again: no work
        ((3, 2), [6, 1, 1])
    """
    lengths = {leaf.shape[:1] for leaf in jtu.tree_leaves(frames)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            "`frames` must have one length along the first axis of every leaf; got "
            f"{sorted(lengths)}."
        )
    if (0,) in lengths:
        raise ValueError("`frames` must hold at least one frame; got none.")
    if z0 is None:
        first = jtu.tree_map(lambda leaf: leaf[0], frames)
        z0 = deq.initial_state(first, key=key)

    def step(z: PyTree, x: PyTree) -> tuple[PyTree, tuple]:
        z = z if carry_gradient else lax.stop_gradient(z)
        # What a bad frame made NaN must not spoil those that follow.
        known = _tree.all_finite(z, getattr(deq.solver, "batch_ndim", 0))
        z = _tree.where(known, z, deq.initial_state(x, key=key))
        sol: optx.Solution = deq.solve(x, z0=z, key=key, options=options)
        return sol.value, (sol.value, lax.stop_gradient(sol.stats))

    _, (values, stats) = lax.scan(step, z0, frames)
    return values, stats
