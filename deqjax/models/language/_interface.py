"""What language models share."""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from ..._tree import wide
from ...nn._checks import check_tokens
from ...nn._tokens import signed
from .._interface import AbstractModel


class AbstractLanguageModel(AbstractModel):
    """A model of `deqjax.models` whose inputs are tokens of shape (batch, length).

    The logits are those of the token that follows each position.
    """

    def nll(
        self, z: Any, targets: Array, *, key: PRNGKeyArray | None = None
    ) -> Float[Array, "batch length"]:
        """−log p of each target in nats, in at least float32; NaN for no token.

        Args:
            z: the `value` of what `solve` returned.
            targets: the token that follows each position.
            key: that of `solve`.

        Raises:
            ValueError: if there is not one target for each position.
        """
        check_tokens("targets", targets)
        logits = self._logits(z, None, key)[0]
        if targets.shape != logits.shape[:-1]:
            raise ValueError(
                "`targets` must be one for each position, of shape "
                f"{logits.shape[:-1]}; got {targets.shape}."
            )
        logits, wanted = logits.astype(wide(logits.dtype)), signed(targets)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        return jnp.where(wanted < 0, jnp.nan, nll)
