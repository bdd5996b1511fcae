"""Small problems, and references for them that share no code with deqjax."""

import contextlib
import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jax import lax
from jax.flatten_util import ravel_pytree

import deqjax

OK = optx.RESULTS.successful

# name -> factory; every solver here is also tested for what solvers share.
SOLVERS: dict[str, Callable[..., Any]] = {
    "picard": deqjax.Picard,
    "damped": ft.partial(deqjax.Picard, beta=0.7),
    "reversible": deqjax.Reversible,
    "anderson": deqjax.Anderson,
    "broyden": deqjax.Broyden,
    "newton": deqjax.NewtonKrylov,
}

# --- problems -------------------------------------------------------------------------


class Problem(NamedTuple):
    """z = fn(z, args), or with `has_aux` fn returns (z, aux)."""

    fn: Callable
    z0: Any
    args: Any
    has_aux: bool = False


def tanh_map(z, args):
    w, x = args
    return jnp.tanh(z @ w + x)


def relu_map(z, args):
    w, x = args
    return jax.nn.relu(z @ w + x)


def linear_map(z, args):
    w, x = args
    return z @ w + x


def norm_map(z, args):
    """A residual block with post-normalisation."""
    w, x = args
    h = 0.3 * z + jax.nn.gelu(z @ w) + x
    h = h - jnp.mean(h, -1, keepdims=True)
    return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 0.1)


def tree_map(z, args):
    """Two coupled leaves of different shapes; one is a matrix."""
    a, b = z["a"], z["b"][0]
    return {
        "a": jnp.tanh(a @ args["w"] + jnp.sum(b, 0) * 0.2 + args["x"]),
        "b": (0.4 * jnp.sin(b) + 0.3 * a[None] * args["x"],),
    }


def aux_map(z, args):
    """aux depends on z and on args, and has an integer leaf."""
    w, x = args
    f = tanh_map(z, args)
    return f, {"energy": jnp.sum(z * z * x), "w": jnp.sin(w), "n": jnp.array(3)}


def idle_map(z, args):
    """args with leaves that f does not use, an index, a count, a flag and a name."""
    assert args["name"] == "idle"
    x = jnp.take(args["x"], args["order"]) * args["count"]
    return jnp.tanh(z @ args["w"] + x)


def weights(key, n, dtype=None, gain=0.7):
    """A matrix of spectral norm `gain`."""
    w = jr.normal(key, (n, n), dtype)
    return (gain / jnp.linalg.norm(w.astype(jnp.float32), 2)).astype(w.dtype) * w


def problem(name: str, n: int = 4) -> Problem:
    """One of the problems below, in the default precision."""
    k1, k2 = jr.split(jr.key(3))
    w, x = weights(k1, n), jr.normal(k2, (n,))
    zero = jnp.zeros(n)
    named = {
        "tanh": lambda: Problem(tanh_map, zero, (w, x)),
        "relu": lambda: Problem(relu_map, zero, (w, x + 0.5)),
        "linear": lambda: Problem(linear_map, zero, (w, x)),
        "norm": lambda: Problem(norm_map, 0.1 * x, (w, x)),
        "tree": lambda: Problem(
            tree_map, {"a": zero, "b": (jnp.zeros((2, n)),)}, {"w": 0.5 * w, "x": x}
        ),
        "aux": lambda: Problem(aux_map, zero, (w, x), has_aux=True),
        "idle": lambda: Problem(
            idle_map,
            zero,
            {
                "w": w,
                "x": x,
                "unused": jnp.ones(3),
                "order": jnp.arange(n)[::-1],
                "count": 1.0,
                "none": None,
                "name": "idle",
            },
        ),
    }
    return named[name]()


def batched(n: int = 3, batch: int = 4, gains=(0.1, 0.6, 0.85, 0.95)) -> Problem:
    """Independent problems along the first axis of different speeds."""
    w = weights(jr.key(5), n, gain=1.0)
    x = 0.5 * jr.normal(jr.key(6), (batch, n))
    gain = jnp.asarray(gains[:batch], x.dtype)[:, None]

    def fn(z, args):
        w, x, gain = args
        return jnp.tanh(gain * (z @ w) + x)

    return Problem(fn, jnp.zeros((batch, n)), (w, x, gain))


def row(p: Problem, i: int) -> Problem:
    """Problem i of those of `batched`."""
    w, x, gain = p.args
    return Problem(p.fn, p.z0[i], (w, x[i], gain[i]))


# --- losses and references ------------------------------------------------------------


def weigh(tree: Any) -> Any:
    """A smooth scalar in which every floating-point entry counts differently."""
    out = 0.0
    for leaf in jtu.tree_leaves(eqx.filter(tree, eqx.is_inexact_array)):
        c = 1 + jnp.sin(1 + jnp.arange(leaf.size, dtype=leaf.dtype))
        out = out + jnp.sum(c.reshape(leaf.shape) * (leaf + 0.3 * leaf**2))
    return out


def pair(p: Problem) -> Callable:
    """The map of a problem in the form that returns (z, aux)."""
    return p.fn if p.has_aux else (lambda z, args: (p.fn(z, args), None))


def loss(p: Problem, **kwargs: Any) -> Callable:
    """(args, z0) -> a scalar of the solution that `deqjax.fixed_point` finds."""

    def run(args, z0=p.z0):
        sol = deqjax.fixed_point(p.fn, z0, args, has_aux=p.has_aux, **kwargs)
        return weigh((sol.value, sol.aux))

    return run


def settle(p: Problem, steps: int = 400) -> Any:
    """The fixed point, by plain iteration far beyond every tolerance used here."""
    fn = pair(p)

    @eqx.filter_jit
    def run(z, args):
        return lax.fori_loop(0, steps, lambda _, z: fn(z, args)[0], z)

    return run(p.z0, p.args)


class Dense(NamedTuple):
    """The derivatives of z* and of `weigh((z*, aux))`, from dense Jacobians."""

    gradient: Any  # exact, by (I − J)⁻ᵀ
    jfb: Any  # with I in place of that inverse
    by: Callable  # with any matrix in place of (I − J)⁻¹
    terms: Callable  # the first k terms of the series for that inverse, damped
    tangent: Callable  # tangent of args (raveled) -> tangent of z* (raveled)
    jacobian: np.ndarray


def dense(p: Problem) -> Dense:
    """J and B = ∂f/∂args at z*, dense, and what NumPy makes of them."""
    z = settle(p)
    moving, fixed = eqx.partition(p.args, eqx.is_inexact_array)
    flat_z, to_z = ravel_pytree(z)
    flat_a, to_a = ravel_pytree(moving)

    def f(z, a):
        out = pair(p)(to_z(z), eqx.combine(to_a(a), fixed))[0]
        return ravel_pytree(out)[0]

    def value(z, a):
        aux = pair(p)(to_z(z), eqx.combine(to_a(a), fixed))[1]
        return weigh((to_z(z), aux))

    @jax.jit
    def derivatives(z, a):
        return (*jax.jacfwd(f, (0, 1))(z, a), *jax.grad(value, (0, 1))(z, a))

    j, b, c, direct = (np.asarray(x) for x in derivatives(flat_z, flat_a))
    a = np.eye(len(j)) - j

    def by(inverse):
        return to_a(jnp.asarray(direct + b.T @ (inverse.T @ c)))

    def terms(k, beta):
        step = (1 - beta) * np.eye(len(j)) + beta * j
        return beta * sum(np.linalg.matrix_power(step, t) for t in range(k))

    return Dense(
        to_a(jnp.asarray(direct + b.T @ np.linalg.solve(a.T, c))),
        by(np.eye(len(j))),
        by,
        terms,
        lambda t: np.linalg.solve(a, b @ np.asarray(t)),
        j,
    )


def picard(p: Problem, steps: int, beta: float = 1.0) -> list[Any]:
    """The iterates z_0, …, z_steps of damped Picard iteration."""
    step = jax.jit(lambda z: mix(beta, z, p.fn(z, p.args)))
    out = [p.z0]
    for _ in range(steps):
        out.append(step(out[-1]))
    return out


def reversible(fn, z0, args, steps: int, beta: float) -> Any:
    """z_N of the coupled scheme, differentiable by plain backpropagation."""
    y = z = z0
    for _ in range(steps):
        y = mix(beta, y, fn(z, args))
        z = mix(beta, z, fn(y, args))
    return z


def mix(beta, z, f):
    return jtu.tree_map(lambda a, b: (1 - beta) * a + beta * b, z, f)


def slope(fn: Callable, at: Any, seed: int = 0, h: float = 1e-3) -> tuple[Any, float]:
    """A random direction, and the derivative of `fn` along it by finite differences.

    Four points, so that the error is of the order h⁴; for float64.
    """
    moving, fixed = eqx.partition(at, eqx.is_inexact_array)
    flat, back = ravel_pytree(moving)
    direction = jr.normal(jr.key(seed), flat.shape, flat.dtype)
    move = jax.jit(lambda t: fn(eqx.combine(back(flat + t * direction), fixed)))
    f = [float(move(jnp.asarray(t))) for t in (-2 * h, -h, h, 2 * h)]
    return back(direction), (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)


def inner(x: Any, y: Any) -> float:
    """⟨x, y⟩ of the floating-point leaves; `None`s count as zeros."""
    parts = jtu.tree_map(
        lambda a, b: 0.0 if a is None or b is None else float(jnp.sum(a * b)),
        eqx.filter(x, eqx.is_inexact_array),
        eqx.filter(y, eqx.is_inexact_array),
        is_leaf=lambda a: a is None,
    )
    return sum(jtu.tree_leaves(parts))


def flat(tree: Any) -> np.ndarray:
    """All floating-point entries, as one float64 vector."""
    leaves = jtu.tree_leaves(eqx.filter(tree, eqx.is_inexact_array))
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in leaves])


def error(got: Any, want: Any) -> float:
    """‖got − want‖ / ‖want‖ over all leaves; NaN if an entry is NaN."""
    a, b = flat(got), flat(want)
    assert a.shape == b.shape
    size = np.linalg.norm(b)
    assert size > 0
    return float(np.linalg.norm(a - b) / size)


def identical(got: Any, want: Any) -> bool:
    """Whether two trees agree bit by bit."""
    return bool(eqx.tree_equal(got, want))


# --- counting -------------------------------------------------------------------------


@ft.cache
def _compiled() -> list[str]:
    """What XLA has compiled since this was called first; JAX forgets no listener."""
    seen = []

    def listen(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seen


@contextlib.contextmanager
def compilations():
    """A list of what XLA compiles within, filled when it ends."""
    before, found = len(_compiled()), []
    yield found
    found += _compiled()[before:]


class Counter:
    """Counts, from the host, how often compiled code evaluates or pulls back a map."""

    def __init__(self):
        self._evaluations: list[int] = []
        self._pulls: list[int] = []

    def reset(self) -> None:
        """Forget what was counted."""
        jax.effects_barrier()
        self._evaluations.clear()
        self._pulls.clear()

    @property
    def evaluations(self) -> int:
        """Evaluations so far."""
        jax.effects_barrier()
        return len(self._evaluations)

    @property
    def pulls(self) -> int:
        """Pull-backs so far."""
        jax.effects_barrier()
        return len(self._pulls)

    def wrap(self, fn: Callable, *, pulls: bool = True) -> Callable:
        """`fn`, counted; where pull-backs are, it has no forward mode."""

        @jax.custom_vjp
        def seen(z):
            return z

        def bwd(_, ct):
            # With an argument, or tracing for another purpose would run it too.
            jax.debug.callback(lambda _: self._pulls.append(1), ct)
            return (ct,)

        seen.defvjp(lambda z: (z, None), bwd)

        def counted(z, args):
            jax.debug.callback(lambda: self._evaluations.append(1))
            return fn(seen(z) if pulls else z, args)

        return counted
