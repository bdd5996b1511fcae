"""Monotone operator equilibrium networks as classifiers."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.random as jr
import optimistix as optx
from jaxtyping import Array, Float, PRNGKeyArray

from ..._types import Options
from ...nn._checks import check_sizes
from ...nn._monotone import MonotoneConv, MonotoneDense
from ...nn._monotone_deq import MonotoneDEQ
from .._interface import AbstractModel

_CIFAR10 = {"shape": (3, 32, 32), "num_classes": 10}


class MonotoneClassifier(AbstractModel):
    """A linear classifier of a monotone equilibrium's coarsest tier.

    | configuration | parameters | equilibrium | inputs |
    |---|---|---|---|
    | `mnist_dense` | 84,313 | 87 | 784 |
    | `cifar10_conv` | 172,218 | 81 × 34 × 34 | 3 × 32 × 32 |
    | `cifar10_tiers` | 170,194 | 16 × 34 × 34, 32 × 18 × 18, 60 × 10 × 10 | 3 × 32 × 32 |
    | `cifar10_conv_large` | 853,612 | 200 × 34 × 34 | 3 × 32 × 32 |
    | `cifar10_tiers_large` | 1,014,546 | 64 × 34 × 34, 128 × 18 × 18, 128 × 10 × 10 | 3 × 32 × 32 |

    `published` takes the arguments of `MonotoneDEQ` beside the key.

    **Differences from the source:** see `MonotoneConv`; the step size α of the
    splitting is not tuned during training; the authors stop at a relative change of
    1e-2 in z of the whole batch.

    Args:
        layer: the equilibrium.
        shape: of one input, without the batch.
        num_classes: length of the output.
        pool: side of the squares over which a convolutional equilibrium is averaged;
            rows and columns that do not fill a square are left out.
        key: decides the initial parameters.

    Raises:
        TypeError, ValueError: if an argument is not valid.

    Example:
        >>> import deqjax, equinox as eqx, jax
        >>> make = deqjax.models.MonotoneClassifier.published
        >>> model = eqx.filter_eval_shape(make, "cifar10_conv", key=jax.random.key(0))
        >>> deqjax.nn.count_parameters(model)
        172218

    References:
        E. Winston, J. Z. Kolter (2020), Monotone operator equilibrium networks,
        doi:10.48550/arXiv.2006.08591.
    """  # noqa: E501 (a row of the table cannot be broken)

    configurations: ClassVar = {
        "mnist_dense": {"shape": (784,), "num_classes": 10, "channels": 87},
        "cifar10_conv": {**_CIFAR10, "channels": (81,), "pool": 4},
        "cifar10_tiers": {**_CIFAR10, "channels": (16, 32, 60)},
        "cifar10_conv_large": {**_CIFAR10, "channels": (200,), "pool": 4},
        "cifar10_tiers_large": {**_CIFAR10, "channels": (64, 128, 128)},
    }

    layer: MonotoneDEQ
    head: eqx.nn.Linear
    pool: int = eqx.field(static=True)

    def __init__(
        self,
        layer: MonotoneDEQ,
        shape: tuple[int, ...],
        num_classes: int,
        *,
        pool: int = 1,
        key: PRNGKeyArray,
    ):
        check_sizes(num_classes=num_classes, pool=pool)
        self.layer = layer
        self.pool = pool
        # Every operator has a U with a weight, a linear layer or a convolution.
        weight = layer.operator.U.weight  # pyright: ignore[reportAttributeAccessIssue]
        example = jax.ShapeDtypeStruct((1, *shape), weight.dtype)
        features = eqx.filter_eval_shape(
            lambda x: self._features(layer.operator.initial_state(x)), example
        )
        if features.shape[1] == 0:
            raise ValueError(
                "`pool` must be at most the side of the equilibrium's coarsest tier: "
                f"nothing is left to classify; got {pool} for inputs of shape {shape}."
            )
        self.head = eqx.nn.Linear(features.shape[1], num_classes, key=key)

    def _solve(
        self,
        inputs: Any,
        state: Any,
        *,
        z0: Any,
        key: PRNGKeyArray | None,
        max_steps: int | None,
        throw: bool,
        options: Options | None,
    ) -> tuple[optx.Solution, Any]:
        sol = self.layer.solve(
            inputs, z0=z0, max_steps=max_steps, throw=throw, options=options
        )
        return sol, state

    def _logits(
        self, z: Any, state: Any, key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "batch classes"], Any]:
        return jax.vmap(self.head)(self._features(z)), state

    def _features(self, z: Any) -> Float[Array, "batch features"]:
        z = z[-1] if isinstance(z, tuple) else z
        if z.ndim == 4:
            z = jax.vmap(eqx.nn.AvgPool2d(self.pool, self.pool))(z)
        return z.reshape(len(z), -1)

    @classmethod
    def _make(
        cls,
        *,
        shape: tuple[int, ...],
        num_classes: int,
        channels: tuple[int, ...] | int,
        pool: int = 1,
        key: PRNGKeyArray,
        **settings: Any,
    ) -> "MonotoneClassifier":
        """The classifier with the operator of that shape; `settings`: of the layer."""
        key1, key2 = jr.split(key)
        if isinstance(channels, int):
            operator = MonotoneDense(shape[0], channels, key=key1)
        else:
            operator = MonotoneConv(shape[0], channels, key=key1)
        layer = MonotoneDEQ(operator, **settings)
        return cls(layer, shape, num_classes, pool=pool, key=key2)
