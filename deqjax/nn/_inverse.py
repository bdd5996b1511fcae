"""Inverses of matrices, differentiated by products with themselves."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

HIGHEST = lax.Precision.HIGHEST


@jax.custom_jvp
def inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """A⁻¹, with d(A⁻¹) = −A⁻¹ dA A⁻¹. For a batch, to be vmapped.

    CPUs invert one matrix after another. jaxlib 0.10 divides a batch among the threads
    that run the program, and where two such calls do not depend on one another, each
    waits for a thread that the other holds: the program never ends.
    """
    return lax.platform_dependent(
        matrix, cpu=sequential_vmap(jnp.linalg.inv), default=jnp.linalg.inv
    )


@inverse.defjvp
def _inverse_jvp(primals: Any, tangents: Any) -> Any:
    (matrix,), (tangent,) = primals, tangents
    out = inverse(matrix)
    right = jnp.matmul(tangent, out, precision=HIGHEST)
    return out, -jnp.matmul(out, right, precision=HIGHEST)
