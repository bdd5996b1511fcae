"""The linear operators of monotone operator equilibrium networks.

Each is W with I − W ≽ m I, in a parametrisation that cannot leave that set, together
with the inverses that splitting methods need.
"""

import abc
import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from .. import _tree
from .._tree import wide
from ._checks import (
    Images,
    check_dtype,
    check_images,
    check_list,
    check_positive,
    check_sizes,
)
from ._fourier import Grid, apply_inverse, identity, invert, symbol_of
from ._inverse import HIGHEST, inverse
from ._normalise import spectral_bound

Tiers: TypeAlias = tuple[Grid, ...]


class AbstractMonotone(eqx.Module):
    """What a monotone equilibrium layer needs of its linear operator W."""

    m: eqx.AbstractVar[float]

    @abc.abstractmethod
    def initial_state(self, x: Any) -> Any:
        """Zeros of the equilibrium's structure.

        Args:
            x: a batch of inputs.
        """

    @abc.abstractmethod
    def inject(self, x: Any) -> Any:
        """U x + b.

        Args:
            x: a batch of inputs.
        """

    @abc.abstractmethod
    def multiply(self, z: Any) -> Any:
        """W z.

        Args:
            z: of the equilibrium's structure.
        """

    @abc.abstractmethod
    def activate(self, z: Any) -> Any:
        """The proximal operator that is the nonlinearity: ReLU.

        Args:
            z: of the equilibrium's structure.
        """

    @abc.abstractmethod
    def resolvent(self, alpha: Any, z: Any) -> Callable[[Any], Any]:
        """v ↦ (I + α (I − W))⁻¹ v.

        Args:
            alpha: α.
            z: of the structure and shapes of v.
        """

    @abc.abstractmethod
    def lipschitz(self, z: Any) -> Float[Array, ""]:
        """An upper bound of ‖I − W‖₂.

        Args:
            z: of the structure and shapes of what I − W is applied to.
        """


class MonotoneDense(AbstractMonotone):
    r"""A monotone operator of full matrices, for inputs of shape (batch, features).

    $$ W = (1 - m) I - A^\top A + B - B^\top , \qquad I - W \succeq m I $$

    | symbol | meaning |
    |---|---|
    | $A, B$ | any square matrices |
    | $m$ | strong monotonicity; at m > 0 there is one equilibrium, for any A and B |

    The injection is U x + b. The resolvent's matrix is inverted once per solve.

    Args:
        in_features: length of an input.
        features: length of the equilibrium.
        m: see above; positive.
        key: decides the initial parameters.

    Raises:
        ValueError: if an argument is not valid.

    References:
        E. Winston, J. Z. Kolter (2020), Monotone operator equilibrium networks,
        doi:10.48550/arXiv.2006.08591.
    """

    U: eqx.nn.Linear
    A: Float[Array, "features features"]
    B: Float[Array, "features features"]
    m: float = eqx.field(static=True)

    def __init__(
        self, in_features: int, features: int, *, m: float = 1.0, key: PRNGKeyArray
    ):
        check_sizes(in_features=in_features, features=features)
        key1, key2, key3 = jr.split(key, 3)
        self.U = eqx.nn.Linear(in_features, features, key=key1)
        linear = lambda k: eqx.nn.Linear(features, features, use_bias=False, key=k)
        self.A, self.B = linear(key2).weight, linear(key3).weight
        self.m = check_m(m)

    def initial_state(self, x: Any) -> Float[Array, "batch features"]:
        return _tree.zeros_for(self._check(x), (len(self.A),))

    def inject(self, x: Any) -> Float[Array, "batch features"]:
        return jax.vmap(self.U)(self._check(x))

    def multiply(self, z: Float[Array, "batch features"]) -> Array:
        return (1 - self.m) * z - (z @ self.A.T) @ self.A + z @ self.B.T - z @ self.B

    def activate(self, z: Float[Array, "batch features"]) -> Array:
        return jax.nn.relu(z)

    def resolvent(self, alpha: Any, z: Array) -> Callable[[Array], Array]:
        gap = self._gap()
        matrix = inverse(identity(gap) + alpha * gap)
        return lambda v: jnp.matmul(
            v.astype(matrix.dtype), matrix.T, precision=HIGHEST
        ).astype(v.dtype)

    def lipschitz(self, z: Array) -> Float[Array, ""]:
        return spectral_bound(self._gap())

    def _gap(self) -> Float[Array, "features features"]:
        """I − W."""
        a, b = (w.astype(wide(w.dtype)) for w in (self.A, self.B))
        square = jnp.matmul(a.T, a, precision=HIGHEST)
        return self.m * identity(a) + square - b + b.T

    def _check(self, x: Any) -> Array:
        wanted = self.U.in_features
        if not eqx.is_array_like(x) or jnp.ndim(x) != 2 or x.shape[1] != wanted:
            got = jnp.shape(x) if eqx.is_array_like(x) else type(x).__name__
            raise ValueError(
                f"`x` must be an array of shape (batch, {wanted}); got {got}."
            )
        x = jnp.asarray(x)
        check_dtype("x", x, self.A.dtype)
        return x


class MonotoneConv(AbstractMonotone):
    r"""A monotone operator of convolutions, at one or several resolutions.

    With $z = (z_1, …, z_n)$, tier i + 1 at about half the resolution of tier i,

    $$ (W z)_i = (1 - m) z_i - A_i^\top (A_i z_i + 2 P_i z_{i-1})
       + B_i z_i - B_i^\top z_i - P_{i+1}^\top P_{i+1} z_i $$

    which is $W = (1 - m) I - A^\top A + B - B^\top$ with $A$ block bidiagonal and the
    off-diagonal of $B$ such that information flows from fine to coarse alone. So W is
    block triangular, and its resolvent is found tier by tier.

    | symbol | meaning |
    |---|---|
    | $A_i, B_i$ | circular convolutions 3 × 3, each a scale times a kernel of norm 1 |
    | $P_i$ | the same with stride 2, from tier i − 1 to tier i |
    | $m$ | strong monotonicity; at m > 0 there is one equilibrium, for any kernels |

    The state of a tier has a border of one pixel, which the nonlinearity sets to zero,
    so that circular convolutions do not join opposite sides of an image. The injection
    is a convolution of the input, into the first tier.

    **The resolvent** is exact: W shifts with the pixels (with blocks of 2 × 2 pixels
    where the next tier has stride 2), and so is block diagonal after a Fourier
    transform. One matrix of C × C (4C × 4C) per frequency is inverted once per solve;
    an application is a transform there and back. An iterative solve would instead
    repeat W many times in every step. The frequency responses are measured: W is
    applied to unit impulses, so that the inverse is that of the W that is applied.

    **Differences from the source:** $A_i$ and $P_i$ have their scale g squared by
    being applied twice, where the authors take its square root or none: no value of a
    parameter can leave the monotone operators.

    Args:
        in_channels: of the input images.
        channels: of each tier; one entry for a single convolution.
        m: see above; positive.
        key: decides the initial parameters.

    Raises:
        ValueError: if an argument is not valid.

    References:
        E. Winston, J. Z. Kolter (2020), Monotone operator equilibrium networks,
        doi:10.48550/arXiv.2006.08591.
    """

    U: eqx.nn.Conv2d
    A: tuple["UnitKernel", ...]
    B: tuple["UnitKernel", ...]
    P: tuple["UnitKernel", ...]
    m: float = eqx.field(static=True)

    def __init__(
        self,
        in_channels: int,
        channels: tuple[int, ...],
        *,
        m: float = 1.0,
        key: PRNGKeyArray,
    ):
        check_sizes(in_channels=in_channels)
        channels = check_list("channels", channels)
        keys = iter(jr.split(key, 3 * len(channels)))
        self.U = eqx.nn.Conv2d(in_channels, channels[0], 3, key=next(keys))
        self.A = tuple(UnitKernel(c, c, 1, key=next(keys)) for c in channels)
        self.B = tuple(UnitKernel(c, c, 1, key=next(keys)) for c in channels)
        self.P = tuple(
            UnitKernel(c, d, 2, key=next(keys)) for c, d in itertools.pairwise(channels)
        )
        self.m = check_m(m)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of each tier."""
        return tuple(a.channels for a in self.A)

    def initial_state(self, x: Images) -> Tiers:
        x = self._check(x)
        height, width = x.shape[2:]
        return tuple(
            _tree.zeros_for(x, (c, (height >> i) + 2, (width >> i) + 2))
            for i, c in enumerate(self.channels)
        )

    def inject(self, x: Images) -> Tiers:
        x = jnp.pad(self._check(x), ((0, 0), (0, 0), (1, 1), (1, 1)))
        first = jax.vmap(self.U)(_wrap(x))
        return (first, *self.initial_state(x[..., 1:-1, 1:-1])[1:])

    def multiply(self, z: Tiers) -> Tiers:
        return tuple(
            self._own(i, z[i]) + (self._from_finer(i, z[i - 1]) if i else 0)
            for i in range(len(z))
        )

    def activate(self, z: Tiers) -> Tiers:
        inside = lambda a: jax.nn.relu(a[..., 1:-1, 1:-1])
        return tuple(jnp.pad(inside(a), ((0, 0), (0, 0), (1, 1), (1, 1))) for a in z)

    def resolvent(self, alpha: Any, z: Tiers) -> Callable[[Tiers], Tiers]:
        inverses = []
        for i, a in enumerate(z):
            gap = lambda v, i=i: v - self._own(i, v)
            symbol = symbol_of(gap, a, self._period(i))
            inverses.append(invert(identity(symbol) + alpha * symbol))

        def solve(v: Tiers) -> Tiers:
            out = []
            for i, (matrices, a) in enumerate(zip(inverses, v, strict=True)):
                rhs = a + alpha * self._from_finer(i, out[-1]) if i else a
                out.append(apply_inverse(matrices, rhs, self._period(i)))
            return tuple(out)

        return solve

    def lipschitz(self, z: Tiers) -> Float[Array, ""]:
        own, links = [], []
        for i, a in enumerate(z):
            gap = lambda v, i=i: v - self._own(i, v)
            own.append(_largest(symbol_of(gap, a, self._period(i))))
            if i:
                coarse = _largest(symbol_of(self.A[i], a, 1))
                down = _largest(symbol_of(self.P[i - 1], z[i - 1], 2))
                links.append(2 * coarse * down)
        # Of the block matrix, by its largest row and column sum of norms.
        zero = jnp.zeros_like(own[0])
        rows = [d + l for d, l in zip(own, [zero, *links], strict=True)]
        columns = [d + l for d, l in zip(own, [*links, zero], strict=True)]
        return jnp.sqrt(jnp.max(jnp.stack(rows)) * jnp.max(jnp.stack(columns)))

    def _own(self, i: int, z: Grid) -> Grid:
        """The diagonal block of W."""
        a, b = self.A[i], self.B[i]
        out = (1 - self.m) * z - a.transpose(a(z), z) + b(z) - b.transpose(z, z)
        if i + 1 < len(self.A):
            p = self.P[i]
            out = out - p.transpose(p(z), z)
        return out

    def _from_finer(self, i: int, z: Grid) -> Grid:
        """The block of W that leads from tier i − 1 to tier i: −2 Aᵀ P."""
        down = jnp.pad(self.P[i - 1](z), ((0, 0), (0, 0), (0, 1), (0, 1)))
        return -2 * self.A[i].transpose(down, down)

    def _period(self, i: int) -> int:
        """The number of pixels by which the diagonal block i of W may be shifted."""
        return 2 if i + 1 < len(self.A) else 1

    def _check(self, x: Images) -> Array:
        weight = self.U.weight
        tiers = len(self.A)
        return check_images(
            x,
            weight.shape[1],
            weight.dtype,
            multiple=2 ** (tiers - 1),
            why=f" for {tiers} tiers",
        )


class UnitKernel(eqx.Module):
    """A circular convolution 3 × 3, its kernel a scale times one of norm 1."""

    direction: Float[Array, "outputs inputs 3 3"]
    scale: Float[Array, ""]
    stride: int = eqx.field(static=True)

    def __init__(self, inputs: int, outputs: int, stride: int, *, key: PRNGKeyArray):
        layer = eqx.nn.Conv2d(inputs, outputs, 3, use_bias=False, key=key)
        self.direction = layer.weight
        self.scale = jnp.ones((), layer.weight.dtype)
        self.stride = stride

    @property
    def channels(self) -> int:
        """Of the output."""
        return self.direction.shape[0]

    def __call__(self, z: Grid) -> Grid:
        d = self.direction
        square = jnp.sum(jnp.square(d.astype(wide(d.dtype))))
        # A direction of 0 has none: the kernel is 0, not NaN.
        size = jnp.sqrt(jnp.where(square > 0, square, 1))
        kernel = (self.scale / size.astype(d.dtype)) * d
        return lax.conv_general_dilated(
            _wrap(z), kernel, (self.stride, self.stride), "VALID"
        )

    def transpose(self, y: Grid, like: Grid) -> Grid:
        """The transposed convolution of y, to the shape of `like`."""
        return jax.linear_transpose(self.__call__, like)(y)[0]


def _largest(symbol: Array) -> Float[Array, ""]:
    """A bound of ‖M‖₂ over all frequencies, at most n^(1/32) too large for n × n."""
    return jnp.max(spectral_bound(symbol, 4))


def _wrap(z: Grid) -> Grid:
    return jnp.pad(z, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="wrap")


def check_m(m: Any) -> float:
    """The strong monotonicity, checked."""
    check_positive("m", m, " At m ≤ 0 the equilibrium need not exist, nor be unique.")
    return float(m)
