"""Weights bounded so that a cell contracts."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Inexact, PRNGKeyArray

from .._tree import wide
from ._checks import check_positive, check_sizes


def spectral_bound(
    matrix: Inexact[Array, "*stack rows columns"], num_squarings: int = 6
) -> Float[Array, "*stack"]:
    r"""An upper bound of the largest singular value, by Gram iteration.

    $$ G_0 = W, \quad G_{i+1} = G_i^{\mathsf H} G_i, \qquad
       \sigma(W) \le \lVert G_k \rVert_F^{1/2^k} \le n^{1/2^{k+1}} \sigma(W) $$

    with n the smaller side of W. Power iteration approaches σ from below, and so
    guarantees nothing; this is a bound at every k, differentiable, and needs no state.
    It is made of products alone, which every accelerator has.

    **Cost:** `num_squarings` products of n × n matrices, the first one with W.

    Args:
        matrix: W, real or complex; leading axes index matrices.
        num_squarings: k; at 6 the bound is at most 5.3% above σ for n = 768, at 8,
            1.3%.

    Returns:
        The bound of each matrix, in at least float32; 0 for W = 0.

    Raises:
        ValueError: if `num_squarings` is not a positive integer.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> w = jnp.array([[3.0, 0.0], [4.0, 5.0]])  # σ = √45
        >>> bool(6.7082 <= deqjax.nn.spectral_bound(w) <= 6.72)
        True

    References:
        B. Delattre, Q. Barthélemy, A. Araujo, A. Allauzen (2023), Efficient bound of
        Lipschitz constant for convolutional layers by Gram iteration,
        doi:10.48550/arXiv.2305.16173.
    """
    check_sizes(num_squarings=num_squarings)
    g = matrix.astype(wide(matrix.dtype))
    g = g if g.shape[-2] >= g.shape[-1] else jnp.swapaxes(g, -2, -1)
    # σ(W) = c σ(g)^(1/2^i), the logarithm of c being kept. The largest entry first, so
    # that no square overflows; the bound does not depend on what was taken out.
    largest = lax.stop_gradient(jnp.max(jnp.abs(g), (-2, -1)))
    largest = jnp.where(largest > 0, largest, 1)
    g, log_c = _over(g, largest), jnp.log(largest)
    for i in range(num_squarings + 1):
        if i:
            left = jnp.conj(jnp.swapaxes(g, -2, -1))
            g = jnp.matmul(left, g, precision=lax.Precision.HIGHEST)
        square = jnp.sum(jnp.real(g * jnp.conj(g)), (-2, -1))
        # W = 0 must not make NaN in the derivative.
        size = jnp.sqrt(jnp.where(square > 0, square, 1))
        log_c = log_c + jnp.log(size) / 2**i
        g = _over(g, size)
    # Rounding must not make the bound less than one.
    slack = 1 + 8 * num_squarings * jnp.finfo(g.dtype).eps
    return jnp.where(jnp.any(matrix != 0, (-2, -1)), jnp.exp(log_c) * slack, 0)


def _over(matrices: Array, sizes: Array) -> Array:
    """Each matrix divided by its size, which is real."""
    return matrices / sizes[..., None, None].astype(matrices.dtype)


class Contractive(eqx.Module):
    r"""A linear or convolutional layer of Lipschitz constant at most κ.

    $$ \hat W = W \min(1, \kappa / s(W)), \qquad s(W) \ge \lVert W \rVert_2 $$

    s is `spectral_bound` of a linear layer's weight; of a convolution with kernels of
    k entries, √k times that of the kernels as a matrix, since no entry of the input is
    used more than k times. Both hold exactly, whatever an optimiser did to W. A cell
    z ↦ φ(Ŵz + Ux + b) with φ of slope at most 1 is then a contraction with factor κ.

    Within the bound W is as it is; `equinox.nn.WeightNorm` serves where rows are to
    have norms of their own. The bound is computed once per solve by
    `deqjax.fixed_point`. `equinox.nn.SpectralNorm` carries a state from call to call
    and is refused inside cells.

    **Cost:** see `spectral_bound`, once per solve.

    Args:
        layer: an `equinox.nn.Linear` or `equinox.nn.Conv`, padded with zeros, or
            circularly by no more than its kernel needs.
        kappa: κ > 0; below 1 for a contraction.
        num_squarings: see `spectral_bound`.

    Raises:
        TypeError: if `layer` is neither.
        ValueError: if `kappa` or `num_squarings` is not valid, or the padding repeats
            entries for the same entry of the kernel.

    Example:
        >>> import deqjax, equinox as eqx, jax.numpy as jnp, jax.random as jr
        >>> layer = eqx.nn.Linear(3, 3, key=jr.key(0))
        >>> layer = eqx.tree_at(lambda l: l.weight, layer, 5 * jnp.eye(3))
        >>> w = deqjax.nn.Contractive(layer, 0.9).bounded().weight
        >>> bool(0.89 < jnp.linalg.norm(w, 2) <= 0.9)
        True

    References:
        T. Miyato, T. Kataoka, M. Koyama, Y. Yoshida (2018), Spectral normalization for
        generative adversarial networks, doi:10.48550/arXiv.1802.05957.
        B. Delattre, Q. Barthélemy, A. Araujo, A. Allauzen (2023), Efficient bound of
        Lipschitz constant for convolutional layers by Gram iteration,
        doi:10.48550/arXiv.2305.16173.
    """

    layer: Any
    kappa: float = eqx.field(static=True)
    num_squarings: int = eqx.field(static=True)

    def __init__(self, layer: Any, kappa: float = 0.95, *, num_squarings: int = 6):
        if not isinstance(layer, eqx.nn.Linear | eqx.nn.Conv):
            raise TypeError(
                "`layer` must be an equinox.nn.Linear or equinox.nn.Conv; got "
                f"{type(layer).__name__}."
            )
        padding = getattr(layer, "padding_mode", "ZEROS")
        if padding not in ("ZEROS", "CIRCULAR"):
            raise ValueError(
                '`layer` must be padded with "ZEROS" or "CIRCULAR", since entries that '
                f"are repeated count more than once; got {padding!r}."
            )
        if isinstance(layer, eqx.nn.Conv) and padding == "CIRCULAR":
            _check_wrap(layer)
        check_positive("kappa", kappa)
        check_sizes(num_squarings=num_squarings)
        self.layer, self.kappa, self.num_squarings = layer, kappa, num_squarings

    def bounded(self) -> Any:
        """The layer with the weight that is used, Ŵ."""
        weight = self.layer.weight
        matrix = weight.reshape(len(weight), -1)
        bound = spectral_bound(matrix, self.num_squarings)
        if isinstance(self.layer, eqx.nn.Conv):
            taps = 1
            for size in self.layer.kernel_size:
                taps *= size
            bound = bound * taps**0.5
        factor = self.kappa / jnp.maximum(bound, self.kappa)
        # Rounding the product down: Ŵ is of the dtype of W.
        factor = factor * (1 - 2 * float(jnp.finfo(weight.dtype).eps))
        scaled = (weight.astype(factor.dtype) * factor).astype(weight.dtype)
        return eqx.tree_at(lambda layer: layer.weight, self.layer, scaled)

    def __call__(self, x: Array, *, key: PRNGKeyArray | None = None) -> Array:
        """The layer at x, with Ŵ."""
        return self.bounded()(x)


def _check_wrap(layer: eqx.nn.Conv) -> None:
    """Raise if an entry of the kernel meets an entry of the input twice."""
    if isinstance(layer.padding, str):
        return  # No more than the kernel needs.
    for (low, high), size, step in zip(
        layer.padding, layer.kernel_size, layer.dilation, strict=True
    ):
        if low + high > (size - 1) * step:
            raise ValueError(
                "`layer` must not be padded circularly by more than its kernel needs, "
                "(kernel_size − 1) · dilation in total, since entries would count more "
                f"than once; got padding {layer.padding} for kernel_size "
                f"{layer.kernel_size} and dilation {layer.dilation}."
            )
