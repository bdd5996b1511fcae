"""Penalties on the Jacobian of the map at its fixed point."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .. import _tree
from .._checks import check_count
from .._convolutions import canonical


def jacobian_norm(
    fn: Callable[[Any, Any], Any],
    z: PyTree,
    args: PyTree = None,
    *,
    key: PRNGKeyArray,
    num_probes: int = 1,
    method: str = "jvp",
    probe: str = "normal",
    batch_ndim: int = 0,
) -> Float[Array, "*batch"]:
    r"""The squared Frobenius norm of ∂f/∂z over the dimension of z, estimated.

    $$ \frac{\lVert J \rVert_F^2}{d}
       = \mathbb{E}\, \frac{\lVert \varepsilon^\top J \rVert^2}{d}
       = \mathbb{E}\, \frac{\lVert J \varepsilon \rVert^2}{d}, \qquad
       \mathbb{E}\, \varepsilon \varepsilon^\top = I $$

    Added to the loss with a weight, at z*, it keeps solves short and stable. z counts
    as a constant: gradients reach the parameters of fn alone, as in the paper. Below 1
    is no guarantee of a contraction; d times it bounds the squared spectral norm.

    | method | per probe | its gradient | |
    |---|---|---|---|
    | `"jvp"` | ‖Jε‖² | forward, then one backward pass | needs fn in forward mode |
    | `"vjp"` | ‖εᵀJ‖², as in the paper | backward through a backward pass | |
    | `"difference"` | ‖(f(z+hε) − f(z))/h‖² | one backward pass | fn evaluated alone |

    The first two are unbiased; which of them varies less depends on J (±1 probes of
    [[1, 1], [0, 0]] vary with the first alone). The third has an error of order
    h, h = √ε per unit of z (3e-4 in float32), and takes any fn that has a gradient; it
    is not for states of less than 32 bits.

    **Cost:** see above, each about two evaluations of fn per probe, and twice that for
    the gradient.

    Args:
        fn: `fn(z, args) -> z`.
        z: where, usually the equilibrium.
        args: passed to fn.
        key: decides the probes.
        num_probes: how many to average over; the published experiments use 1 or 2.
        method: `"jvp"`, `"vjp"` or `"difference"`.
        probe: `"normal"` as in the paper, or `"rademacher"` (±1), of smaller variance.
        batch_ndim: leading axes that index independent problems.

    Returns:
        The estimate for each problem, in at least float32. Its mean over a batch is
        what the paper adds to the loss.

    Raises:
        ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp, jax.random as jr
        >>> f = lambda z, a: a * z
        >>> norm = deqjax.regularise.jacobian_norm(
        ...     f, jnp.ones(4), 0.5, key=jr.key(0), probe="rademacher")
        >>> float(norm)  # J = I/2
        0.25

    References:
        S. Bai, V. Koltun, J. Z. Kolter (2021), Stabilizing equilibrium models by
        Jacobian regularization, doi:10.48550/arXiv.2106.14342.
        M. F. Hutchinson (1990), A stochastic estimator of the trace of the influence
        matrix for Laplacian smoothing splines, doi:10.1080/03610919008812866.
    """
    check_count("num_probes", num_probes, 1)
    _choose("method", method, ("jvp", "vjp", "difference"))
    _choose("probe", probe, ("normal", "rademacher"))
    z = lax.stop_gradient(z)
    f = lambda z: fn(z, args)
    _check(f, z, batch_ndim)
    if method == "vjp":
        pull = jax.vjp(f, z)[1]
        product = lambda v: pull(v)[0]
    elif method == "jvp":
        product = lambda v: jax.jvp(f, (z,), (v,))[1]
    else:
        product = _difference(f, z, batch_ndim)
    draw = jr.normal if probe == "normal" else jr.rademacher
    total = 0.0
    for k in jr.split(key, num_probes):
        out = product(_tree.draw(draw, k, z))
        total = total + _tree.dot(out, out, batch_ndim)
    return jnp.asarray(total) / (num_probes * _tree.size(z, batch_ndim))


def jacobian_spectral_norm(
    fn: Callable[[Any, Any], Any],
    z: PyTree,
    args: PyTree = None,
    *,
    key: PRNGKeyArray,
    num_steps: int = 10,
    batch_ndim: int = 0,
) -> Float[Array, "*batch"]:
    r"""The largest singular value of ∂f/∂z, by power iteration on JᵀJ.

    $$ v \leftarrow \frac{J^\top J v}{\lVert J^\top J v \rVert}, \qquad
       \sigma \approx \lVert J v \rVert, \qquad
       \bar J = u v^\top \bar\sigma, \quad u = J v / \sigma $$

    An estimate from below, whose gradient takes v for a constant, which it is to first
    order at the singular vector. z counts as a constant too. Below 1, f contracts
    around z.

    **Cost:** one linearisation and 2 × `num_steps` + 1 products; its gradient, a
    forward and a backward pass.

    Args:
        fn: `fn(z, args) -> z`, differentiable in forward mode.
        z: where, usually the equilibrium.
        args: passed to fn.
        key: decides where the iteration starts.
        num_steps: its steps.
        batch_ndim: leading axes that index independent problems.

    Returns:
        The estimate for each problem, in at least float32.

    Raises:
        ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp, jax.random as jr
        >>> f = lambda z, a: a * z
        >>> a = jnp.array([0.9, 0.1, 0.2])
        >>> norm = deqjax.regularise.jacobian_spectral_norm(
        ...     f, jnp.ones(3), a, key=jr.key(0))
        >>> round(float(norm), 4)
        0.9

    References:
        T. Miyato, T. Kataoka, M. Koyama, Y. Yoshida (2018), Spectral normalization for
        generative adversarial networks, doi:10.48550/arXiv.1802.05957.
    """
    check_count("num_steps", num_steps, 1)
    z = lax.stop_gradient(z)
    f = lambda z: fn(z, args)
    _check(f, z, batch_ndim)
    product = jax.linearize(canonical(f), z)[1]
    transposed = jax.linear_transpose(product, z)

    def step(_: Any, v: PyTree) -> PyTree:
        return _unit(transposed(product(v))[0], batch_ndim)

    start = _unit(_tree.draw(jr.normal, key, z), batch_ndim)
    v = lax.stop_gradient(lax.fori_loop(0, num_steps, step, start))
    out = jax.jvp(f, (z,), (v,))[1]
    square = _tree.dot(out, out, batch_ndim)
    # The root has no derivative at 0.
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def _difference(f: Callable, z: PyTree, batch_ndim: int) -> Callable:
    """v ↦ (f(z + hv) − f(z)) / h, h relative to the size of z."""
    base = f(z)
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jtu.tree_leaves(z))
    mean = _tree.dot(z, z, batch_ndim) / _tree.size(z, batch_ndim)
    h = eps**0.5 * jnp.maximum(jnp.sqrt(mean), 1)

    def product(v: PyTree) -> PyTree:
        moved = jtu.tree_map(lambda a, b: a + b, z, _tree.scale(h, v))
        return _tree.scale(1 / h, _tree.subtract(f(moved), base))

    return product


def _unit(v: PyTree, batch_ndim: int) -> PyTree:
    size = _tree.norm(v, batch_ndim)
    return _tree.scale(1 / jnp.where(size > 0, size, 1), v)


def _check(f: Callable, z: PyTree, batch_ndim: int) -> None:
    """Raise unless f maps states of real numbers, with a batch, to such."""
    for path, leaf in jtu.tree_leaves_with_path(z):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"`z{jtu.keystr(path)}` must be real and floating-point; got "
                f"{jnp.result_type(leaf)}."
            )
    _tree.batch_shape(z, batch_ndim)
    facts = lambda tree: jtu.tree_map(lambda a: (a.shape, str(a.dtype)), tree)
    want, got = facts(jax.eval_shape(lambda: z)), facts(jax.eval_shape(f, z))
    if want != got:
        raise ValueError(f"`fn` must return states like `z`, {want}; it returns {got}.")


def _choose(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        names = ", ".join(f'"{k}"' for k in known)
        raise ValueError(f"`{name}` must be one of {names}; got {value!r}.")
