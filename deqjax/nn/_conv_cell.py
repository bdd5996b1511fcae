"""The cell of the reversible DEQ for images."""

import equinox as eqx
import jax
import jax.random as jr
from jaxtyping import Array, PRNGKeyArray

from ._checks import check_sizes
from ._images import Features, conv


def group_norm(channels: int) -> eqx.nn.GroupNorm:
    """16 channels per group where they divide, else one group."""
    groups = max(channels // 16, 1)
    return eqx.nn.GroupNorm(groups if channels % groups == 0 else 1, channels)


class ConvCell(eqx.Module):
    r"""The cell of the RevDEQ for images.

    $$ f(z, x) = N_3\,\mathrm{relu}\bigl(z + N_2(x + C_2\,
       \mathrm{relu}(N_1 C_1 z))\bigr) $$

    with convolutions C of 3 × 3 without bias and group norms N of 16 channels per
    group, on arrays (batch, channels, height, width).

    Args:
        channels: of z and of x.
        width: there are `width` times as many channels between C₁ and C₂.
        key: decides the initial parameters.

    Raises:
        ValueError: if an argument is not valid.

    References:
        S. McCallum, K. Arora, J. Foster (2025), Reversible deep equilibrium models,
        doi:10.48550/arXiv.2509.12917.
    """

    conv1: eqx.nn.Conv2d
    conv2: eqx.nn.Conv2d
    norm1: eqx.nn.GroupNorm
    norm2: eqx.nn.GroupNorm
    norm3: eqx.nn.GroupNorm

    def __init__(self, channels: int, width: int = 1, *, key: PRNGKeyArray):
        check_sizes(channels=channels, width=width)
        key1, key2 = jr.split(key)
        self.conv1 = conv(channels, width * channels, 3, key=key1)
        self.conv2 = conv(width * channels, channels, 3, key=key2)
        self.norm1 = group_norm(width * channels)
        self.norm2, self.norm3 = group_norm(channels), group_norm(channels)

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
        h = jax.nn.relu(self.norm1(self.conv1(z)))
        return self.norm3(jax.nn.relu(z + self.norm2(x + self.conv2(h))))
