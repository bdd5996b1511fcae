"""The cell of the implicit residual network."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray

from ._checks import check_groups, check_sizes
from ._images import Features, conv

SLOPE = 0.1


class Residual(eqx.Module):
    """x + C₂ leaky(C₁ x), without what the two uses of it do next."""

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d

    def __init__(self, channels: int, *, key: PRNGKeyArray):
        key1, key2 = jr.split(key)
        self.conv1 = conv(channels, channels, 3, bias=True, key=key1)
        self.conv2 = conv(channels, channels, 3, bias=True, key=key2)

    def __call__(self, x: Array, drop: Callable = lambda h: h) -> Array:
        return x + self.conv2(drop(leaky(self.conv1(x))))


class ImplicitResNetCell(eqx.Module):
    r"""The cell of the implicit residual network.

    $$ h_0 = x + \gamma z, \qquad
       h_{i+1} = N\,\mathrm{leaky}\bigl(h_i + C_i'\,\mathrm{leaky}(C_i h_i)\bigr),
       \qquad f(z, x) = h_n $$

    with convolutions 3 × 3 with bias, leaky ReLUs of slope 0.1, and norms N without
    parameters.

    Args:
        channels: of z and x.
        num_blocks: n.
        gamma: γ, the weight of the state.
        groups: of the group norms N.
        key: decides the initial parameters.

    Raises:
        ValueError: if an argument is not valid.

    References:
        S. W. Fung, H. Heaton, Q. Li, D. McKenzie, S. Osher, W. Yin (2022), JFB:
        Jacobian-free backpropagation for implicit networks,
        doi:10.1609/aaai.v36i6.20619.
    """

    blocks: tuple[Residual, ...]
    norm: eqx.nn.GroupNorm
    gamma: float = eqx.field(static=True)

    def __init__(
        self,
        channels: int,
        num_blocks: int = 5,
        *,
        gamma: float = 0.5,
        groups: int = 1,
        key: PRNGKeyArray,
    ):
        check_sizes(channels=channels, num_blocks=num_blocks)
        check_groups((channels,), groups)
        if isinstance(gamma, bool) or not (
            isinstance(gamma, int | float) and 0 < gamma < 1
        ):
            raise ValueError(f"`gamma` must satisfy 0 < gamma < 1; got {gamma!r}.")
        self.blocks = tuple(
            Residual(channels, key=k) for k in jr.split(key, num_blocks)
        )
        self.norm = eqx.nn.GroupNorm(groups, channels, channelwise_affine=False)
        self.gamma = gamma

    def __call__(
        self, z: Features, x: Features, *, key: PRNGKeyArray | None = None
    ) -> Features:
        """f for a whole batch.

        Args:
            z: the state, of shape (batch, channels, height, width).
            x: what is injected, of the same shape.
            key: not used: nothing here is random.
        """
        return jax.vmap(self._one)(z, x)

    def _one(self, z: Array, x: Array) -> Array:
        h = x + self.gamma * z
        for block in self.blocks:
            h = self.norm(leaky(block(h)))
        return h


def leaky(x: Array) -> Array:
    """The leaky ReLU of the authors."""
    return jax.nn.leaky_relu(x, SLOPE)
