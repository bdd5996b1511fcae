"""Picard iteration: repeated, optionally damped, application of the map."""

import equinox as eqx
from jaxtyping import Array, PyTree

from .._checks import real, whole
from .._types import Aux, Tolerance, Y
from ._base import AbstractSolver, Trial, check_beta, relax


class Picard(AbstractSolver[Y, Aux]):
    r"""Picard (Banach) iteration, damped by `beta`.

    $$ z_{k+1} = (1 - \beta)\, z_k + \beta\, f(z_k) $$

    | symbol | meaning |
    |---|---|
    | $z_k$ | iterate |
    | $f$ | the map whose fixed point is sought |
    | $\beta$ | weight on $f$; 1 is undamped |

    **Cost:** one evaluation per step; f is traced once. **Memory:** 2 copies of z.

    **Converges** if f is a contraction, linearly with its Lipschitz constant; damped,
    if every eigenvalue μ of the Jacobian satisfies |1 − β + βμ| < 1 (near the fixed
    point). **Fails** visibly (`nonfinite`, `nonlinear_max_steps_reached`) otherwise.

    Stops when ‖f(z) − z‖ ≤ atol + rtol ‖f(z)‖ and returns that z. A tested solve
    that does not converge returns the iterate of smallest residual. With
    `rtol=None, atol=None` exactly `max_steps` steps are taken, the last iterate is
    returned, and the residual is that of the iterate evaluated last.

    Args:
        rtol: tolerance relative to ‖f(z)‖, or None. "auto" goes by the coarsest dtype
            of the state: 1e-8 in float64, 1e-4 in float32, 5e-3 in float16, 2e-2 in
            bfloat16.
        atol: absolute tolerance, or None; "auto": a hundredth of the above.
        beta: weight on f, 0 < beta < 2.
        min_steps: steps before which the test cannot pass.
        batch_ndim: number of leading axes that index independent problems.

    Raises:
        ValueError: if a tolerance, `beta`, `min_steps` or `batch_ndim` is not valid.

    Example:
        >>> import deqjax, jax.numpy as jnp
        >>> solver = deqjax.Picard(rtol=1e-5, atol=1e-6)
        >>> f = lambda z, _: jnp.cos(z)
        >>> sol = deqjax.fixed_point(f, jnp.ones(()), solver=solver)
        >>> round(float(sol.value), 3)
        0.739

    References:
        S. Banach (1922), Sur les opérations dans les ensembles abstraits et leur
        application aux équations intégrales, doi:10.4064/fm-3-1-133-181.
    """

    rtol: Tolerance = eqx.field(default="auto", converter=real)
    atol: Tolerance = eqx.field(default="auto", converter=real)
    beta: float | Array = eqx.field(default=1.0, kw_only=True, converter=real)
    min_steps: int = eqx.field(default=0, kw_only=True, converter=whole)
    batch_ndim: int = eqx.field(default=0, kw_only=True, converter=whole)

    plain = True

    def __check_init__(self):
        check_beta(self.beta, below=2.0)

    def update(
        self, z: Y, f: Y, memory: PyTree, trial: Trial | None = None
    ) -> tuple[Y, PyTree]:
        undamped = isinstance(self.beta, float) and self.beta == 1
        return f if undamped else relax(z, f, self.beta), None
