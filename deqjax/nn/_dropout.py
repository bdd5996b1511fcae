"""Dropout whose mask is drawn once per solve."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, PRNGKeyArray

from ._checks import check_rate


def split_key(key: PRNGKeyArray | None, num: int) -> list[PRNGKeyArray | None]:
    """`num` keys; without one, as many times None."""
    return [None] * num if key is None else list(jr.split(key, num))


def dropout_layer(rate: float, make: Callable[[float], eqx.Module]) -> eqx.Module:
    """`make(rate)`, or for a rate of 0 a layer that does nothing and has no leaves.

    So a model without dropout is the same pytree as one that has never known any.
    """
    check_rate("dropout", rate)
    return make(rate) if rate else eqx.nn.Identity()


class VariationalDropout(eqx.Module):
    r"""Dropout that may share its mask along axes, for use inside cells.

    $$ x \mapsto \frac{m \odot x}{1 - p}, \qquad m_i \sim \mathrm{Bernoulli}(1 - p) $$

    The mask is a function of the key and of the shape alone. `deqjax.nn.DEQ` gives its
    cell one key per solve, so that the mask is the same at every iteration, and
    `deqjax.fixed_point` draws it once, outside of its loops. Give every dropout of a
    cell a key of its own, with `jax.random.split` inside of the cell.

    **Cost:** one product and one selection per call. **Memory:** the mask, for the
    length of a solve.

    As `equinox.nn.Dropout`, it does nothing in inference mode, which
    `equinox.nn.inference_mode` switches for a whole model.

    Args:
        p: the rate: how many entries, on average, are set to zero.
        share: axes along which all entries share the mask's value; count them from
            the end, so that batches do not matter. `()`: each entry has its own.
        inference: whether to do nothing.

    Raises:
        ValueError: if `p` does not lie in [0, 1), or an axis of `share` is not there.
        RuntimeError: if a key is needed and missing.

    Example:
        >>> import deqjax, jax.numpy as jnp, jax.random as jr
        >>> drop = deqjax.nn.VariationalDropout.tokens(0.5)  # x: (…, tokens, features)
        >>> y = drop(jnp.ones((7, 4)), key=jr.key(0))
        >>> bool((y == y[0]).all())
        True

    References:
        Y. Gal, Z. Ghahramani (2016), A theoretically grounded application of dropout
        in recurrent neural networks, doi:10.48550/arXiv.1512.05287.
    """

    p: float
    share: tuple[int, ...] = eqx.field(static=True)
    inference: bool

    def __init__(
        self, p: float = 0.5, *, share: tuple[int, ...] = (), inference: bool = False
    ):
        check_rate("p", p)
        if any(axis >= 0 for axis in share):
            raise ValueError(
                "`share` must count axes from the end (−1 is the last), so that "
                f"leading axes do not matter; got {share}."
            )
        self.p, self.share, self.inference = p, share, inference

    @classmethod
    def dense(cls, p: float = 0.5, **kwargs: bool) -> "VariationalDropout":
        """A mask for every entry of (…, features)."""
        return cls(p, share=(), **kwargs)

    @classmethod
    def channels(cls, p: float = 0.5, **kwargs: bool) -> "VariationalDropout":
        """Whole channels of (…, channels, height, width)."""
        return cls(p, share=(-2, -1), **kwargs)

    @classmethod
    def tokens(cls, p: float = 0.5, **kwargs: bool) -> "VariationalDropout":
        """Whole features of (…, tokens, features), the same at every token."""
        return cls(p, share=(-2,), **kwargs)

    def __call__(
        self,
        x: Array,
        *,
        key: PRNGKeyArray | None = None,
        inference: bool | None = None,
    ) -> Array:
        """Drop entries of x.

        Args:
            x: what to drop from.
            key: decides the mask.
            inference: in place of the layer's own.
        """
        inference = self.inference if inference is None else inference
        if inference or (isinstance(self.p, int | float) and self.p == 0):
            return x
        if key is None:
            raise RuntimeError(
                "`VariationalDropout` needs a `key` in training: pass one to the model "
                "or layer, or put it in inference mode with "
                "`equinox.nn.inference_mode`."
            )
        if any(-axis > x.ndim for axis in self.share):
            raise ValueError(
                f"`share` = {self.share} asks for axes that x of shape {x.shape} does "
                "not have."
            )
        shape = list(x.shape)
        for axis in self.share:
            shape[axis] = 1
        p = lax.stop_gradient(self.p) if isinstance(self.p, Array) else self.p
        keep = 1 - p
        mask = jr.bernoulli(key, keep, tuple(shape))
        return jnp.where(mask, x / keep, 0)
