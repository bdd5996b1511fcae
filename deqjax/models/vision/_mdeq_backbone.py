"""Stem, injection and equilibrium of the multiscale deep equilibrium models."""

from typing import Any

import equinox as eqx
import jax.random as jr
import optimistix as optx
from jaxtyping import PRNGKeyArray

from ..._types import Options
from ...nn._checks import Images, batched_solver, check_images, check_sizes
from ...nn._deq import DEQ
from ...nn._images import ConvNorms
from ...nn._mdeq_cell import INIT_STD, MDEQCell, Scales
from ...solvers import Anderson
from ...solvers._optimistix import AnySolver
from .._interface import check_state


class MDEQBackbone(eqx.Module):
    r"""Stem, injection and the equilibrium at every scale, for heads of any kind.

    Two convolutions 3 × 3 with batch norm and ReLU; injection 1 × 1 with batch norm and
    ReLU (not with two scales at full resolution, as in the authors' smallest model);
    the equilibrium of an `MDEQCell`, from zero.

    Args:
        channels: of each scale.
        in_channels: of the images.
        halvings: how many convolutions of the stem have stride 2; 0, 1 or 2.
        expansion: see `MDEQCell`.
        groups: see `MDEQCell`.
        dropout: see `MDEQCell`.
        post_affine: see `MDEQCell`.
        momentum: of the batch norms' running statistics.
        solver: see `MDEQClassifier`.
        adjoint: see `deqjax.fixed_point`.
        max_steps: see `deqjax.fixed_point`.
        key: decides the initial parameters.

    Raises:
        TypeError, ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, equinox as eqx, jax, jax.numpy as jnp
        >>> make = eqx.nn.make_with_state(deqjax.models.MDEQBackbone)
        >>> model, state = make((8, 8), groups=4, key=jax.random.key(0))
        >>> sol, state = eqx.filter_eval_shape(model, jnp.ones((1, 3, 8, 8)), state)
        >>> [z.shape for z in sol.value]
        [(1, 8, 8, 8), (1, 8, 4, 4)]

    References:
        S. Bai, V. Koltun, J. Z. Kolter (2020), Multiscale deep equilibrium models,
        doi:10.48550/arXiv.2006.08656.
    """

    stem: ConvNorms
    inject: ConvNorms | None
    deq: DEQ
    multiple: int = eqx.field(static=True)

    def __init__(
        self,
        channels: tuple[int, ...],
        *,
        in_channels: int = 3,
        halvings: int = 0,
        expansion: int = 5,
        groups: int = 8,
        dropout: float = 0.0,
        post_affine: bool = True,
        momentum: float = 0.9,
        solver: AnySolver | None = None,
        adjoint: optx.AbstractAdjoint | None = None,
        max_steps: int = 18,
        key: PRNGKeyArray,
    ):
        check_sizes(in_channels=in_channels)
        if halvings not in (0, 1, 2):
            raise ValueError(f"`halvings` must be 0, 1 or 2; got {halvings!r}.")
        key1, key2, key3 = jr.split(key, 3)
        cell = MDEQCell(
            channels,
            expansion=expansion,
            groups=groups,
            dropout=dropout,
            post_affine=post_affine,
            key=key1,
        )
        c, scales = cell.channels[0], len(cell.channels)
        strides = (2 if halvings > 0 else 1, 2 if halvings > 1 else 1)
        common: dict[str, Any] = {"momentum": momentum, "std": INIT_STD}
        self.stem = ConvNorms((in_channels, c, c), strides, (3, 3), **common, key=key2)
        plain = halvings == 0 and scales == 2
        self.inject = (
            None if plain else ConvNorms((c, c), (1,), (1,), **common, key=key3)
        )
        solver = batched_solver(solver, Anderson(batch_ndim=1))
        self.deq = DEQ(cell, solver=solver, adjoint=adjoint, max_steps=max_steps)
        self.multiple = 2 ** (halvings + scales - 1)

    def __call__(
        self,
        images: Images,
        state: Any,
        *,
        z0: Scales | None = None,
        key: PRNGKeyArray | None = None,
        max_steps: int | None = None,
        throw: bool = False,
        options: Options | None = None,
    ) -> tuple[optx.Solution, eqx.nn.State]:
        """The equilibrium, as a solution, and the new state of the batch norms.

        Args:
            images: of shape (batch, channels, height, width).
            state: as `equinox.nn.make_with_state` returned it, or the last call.
            z0: the initial iterate, one array per scale; None: zeros.
            key: for dropout, one mask per solve.
            max_steps: in place of the model's own.
            throw: see `deqjax.fixed_point`.
            options: see `deqjax.fixed_point`.
        """
        check_state(state)
        weight = self.stem.convs[0].weight
        x = check_images(
            images,
            weight.shape[1],
            weight.dtype,
            multiple=self.multiple,
            why=" for the halvings of the model",
        )
        x, state = self.stem(x, state)
        if self.inject is not None:
            x, state = self.inject(x, state)
        sol = self.deq.solve(
            x, z0=z0, key=key, max_steps=max_steps, throw=throw, options=options
        )
        return sol, state
