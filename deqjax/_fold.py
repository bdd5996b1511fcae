"""What does not depend on the iterate is computed once per solve.

f(z, args) = g(z, h(args)): h holds the injection of the input, the normalisation of
weights, masks drawn from a key. Splitting f in two keeps them out of the loops,
forwards and backwards. Their gradient is pulled back once, and what is kept instead of
computed again need not come out the same twice.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from ._convolutions import rewrite
from ._upstream import bind

# Only move or repeat entries: cheaper to do again than to keep.
_CHEAP = {"broadcast_in_dim", "expand_dims", "iota", "reshape", "squeeze", "transpose"}

# What `jax.checkpoint` is called in a jaxpr, by version …
_REMAT = {"checkpoint", "remat", "remat2"}

# … and `jax.jit`.
_JIT = {"jit", "pjit"}


def fold(
    fn: Callable[[PyTree, PyTree], PyTree], z: PyTree, args: PyTree
) -> tuple[Callable[[PyTree, list[Array]], PyTree], list[Array], PyTree]:
    """Split `fn` into a part that depends on z and one that does not.

    Everything with an effect, and every callback, stays in the part that depends on z.

    Args:
        fn: `fn(z, args)`, traced once.
        z: an example of the iterate.
        args: as in `fn`.

    Returns:
        `rest`, `kept` and the structure of the output, with
        `rest(z, kept) == fn(z, args)` for every z.
    """
    traced = trace(fn, z, args)
    rest, kept = split(traced.closed, traced.inputs, len(jtu.tree_leaves(z)))

    def whole(z: PyTree, kept: list[Array]) -> PyTree:
        return traced.output(rest(jtu.tree_leaves(z), kept))

    return whole, kept, traced.struct


class Traced(NamedTuple):
    """A function after it has been called once.

    Attributes:
        closed: its jaxpr, in which no inner jaxpr of a jitted function has constants.
        inputs: the arrays among its arguments.
        struct: its output, without what are no arrays there.
        static: what are none.
    """

    closed: Any
    inputs: list[Array]
    struct: PyTree
    static: PyTree

    def output(self, leaves: list[Array]) -> PyTree:
        """The output that has these arrays."""
        out = jtu.tree_unflatten(jtu.tree_structure(self.struct), leaves)
        return eqx.combine(out, self.static)


def trace(fn: Callable[..., PyTree], *args: PyTree) -> Traced:
    """Call `fn` once, on tracers."""
    closed, struct, static = eqx.filter_make_jaxpr(fn)(*args)
    inputs = [x for x in jtu.tree_leaves(args) if eqx.is_array(x)]
    if _hides_constants(closed.jaxpr):
        none = [False] * len(inputs)
        closed, _ = _flat(closed.jaxpr, closed.consts, inputs, none)
    return Traced(closed, inputs, struct, static)


def split(
    closed: Any, inputs: Sequence[Array], size: int
) -> tuple[Callable[[list[Array], list[Array]], list[Array]], list[Array]]:
    """`fold` for a jaxpr of which the first `size` inputs are the iterate."""
    # Once, here, for all loops: what is derived from a canonical map is canonical.
    closed = rewrite(closed)
    varies = [i < size for i in range(len(inputs))]
    rest, kept = _divide(_flat(closed.jaxpr, closed.consts, inputs, varies), varies)
    # Constants that Python numbers were traced to are not arrays.
    return rest, [x if isinstance(x, jax.Array) else jnp.asarray(x) for x in kept]


def _divide(
    flat: tuple[Any, Sequence[Any]], varies: Sequence[bool]
) -> tuple[Callable[[Sequence[Any], Sequence[Any]], list[Any]], list[Any]]:
    """Run what does not depend on the inputs that vary: the rest, and what it needs."""
    closed, inputs = flat
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    named = list(zip(jaxpr.invars, inputs, varies, strict=True))
    values.update((v, x) for v, x, moves in named if not moves)
    moving = [v for v, _, moves in named if moves]

    once, always = _split(jaxpr.eqns, moving, set(values))
    for eqn in once:
        _step(eqn, values)
    always = _live(always, jaxpr.outvars)
    used = {v for eqn in always for v in eqn.invars if _is_var(v)}
    used |= {v for v in jaxpr.outvars if _is_var(v)}
    # Constants that both parts use are made by both.
    used -= {v for eqn in always for v in eqn.outvars}
    kept_vars = [v for v in values if v in used]

    def rest(moved: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
        env = dict(zip(kept_vars, kept, strict=True))
        env.update(zip(moving, moved, strict=True))
        for eqn in always:
            _step(eqn, env)
        return [_read(v, env) for v in jaxpr.outvars]

    return rest, [values[v] for v in kept_vars]


def _split(
    eqns: Sequence[Any], iterate: Sequence[Any], given: set[Any]
) -> tuple[list[Any], list[Any]]:
    """The equations to run once, and those to run at every evaluation."""
    varying, fixed = set(iterate), set(given)
    once, always = [], []
    for i, eqn in enumerate(eqns):
        invars = {v for v in eqn.invars if _is_var(v)}
        if _is_impure(eqn) or invars & varying:
            always.append(i)
            varying |= set(eqn.outvars)
        elif invars & fixed:
            once.append(i)
            fixed |= set(eqn.outvars)
        else:
            # Made of constants alone, a mask say: not worth keeping.
            always.append(i)
    return _frontier(eqns, once, always)


def _live(eqns: list[Any], outvars: Sequence[Any]) -> list[Any]:
    """The equations that lead to an output or have an effect.

    Constants that the first part alone needs would otherwise be made again at every
    evaluation, and what they are made of kept.
    """
    needed = {v for v in outvars if _is_var(v)}
    live = []
    for eqn in reversed(eqns):
        if _is_impure(eqn) or needed & set(eqn.outvars):
            live.append(eqn)
            needed |= {v for v in eqn.invars if _is_var(v)}
    return live[::-1]


def _frontier(
    eqns: Sequence[Any], once: list[int], always: list[int]
) -> tuple[list[Any], list[Any]]:
    """Leave to every evaluation what is cheap, and used there alone.

    Equations made of constants are run wherever they are used.
    """
    needed: set[Any] = set()
    first = []
    made = {v: i for i in always for v in eqns[i].outvars}
    for i in reversed(once):
        eqn = eqns[i]
        if eqn.primitive.name in _CHEAP and not needed & set(eqn.outvars):
            always.append(i)
            continue
        first.append(i)
        needed |= {v for v in eqn.invars if _is_var(v)}
    # Constants that the first part needs.
    pending = [made[v] for v in needed if v in made]
    while pending:
        i = pending.pop()
        if i not in first:
            first.append(i)
            inner = (v for v in eqns[i].invars if _is_var(v))
            pending += [made[v] for v in inner if v in made]
    return [eqns[i] for i in sorted(first)], [eqns[i] for i in sorted(always)]


# A small interpreter of jaxprs


def _is_impure(eqn: Any) -> bool:
    return bool(eqn.effects) or "callback" in eqn.primitive.name


def _is_var(v: Any) -> bool:
    return not isinstance(v, jex.core.Literal)


def _read(v: Any, env: dict[Any, Any]) -> Any:
    return env[v] if _is_var(v) else v.val


def _step(eqn: Any, env: dict[Any, Any]) -> None:
    inputs = [_read(v, env) for v in eqn.invars]
    env.update(zip(eqn.outvars, bind(eqn, inputs), strict=True))


def _hides_constants(jaxpr: Any) -> bool:
    """Whether a jitted function within has constants of its own."""
    inner = [e.params["jaxpr"] for e in jaxpr.eqns if e.primitive.name in _JIT]
    return any(len(c.consts) > 0 or _hides_constants(c.jaxpr) for c in inner)


def _flat(
    jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any], varies: Sequence[bool]
) -> tuple[Any, Sequence[Any]]:
    """A jaxpr without calls, and its inputs."""
    run = lambda *xs: _enter(jaxpr, consts, xs, varies)[0]
    return jax.make_jaxpr(run)(*inputs), inputs


def _enter(
    jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any], varies: Sequence[bool]
) -> tuple[list[Any], list[bool]]:
    """Evaluate a jaxpr: the outputs, and which of them depend on inputs that vary.

    Calls of jitted functions are entered. Of a checkpoint, what does not vary is taken
    out, so that the rest is all that it evaluates again.
    """
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    varying = {v for v, moves in zip(jaxpr.invars, varies, strict=True) if moves}
    for eqn in jaxpr.eqns:
        values = [_read(v, env) for v in eqn.invars]
        moves = [_is_var(v) and v in varying for v in eqn.invars]
        name = eqn.primitive.name
        if name in _JIT:
            inner = eqn.params["jaxpr"]
            outputs, moved = _enter(inner.jaxpr, inner.consts, values, moves)
        else:
            moved = [any(moves) or _is_impure(eqn)] * len(eqn.outvars)
            splits = name in _REMAT and any(moves) and not _is_impure(eqn)
            outputs = _checkpoint(eqn, values, moves) if splits else bind(eqn, values)
        env.update(zip(eqn.outvars, outputs, strict=True))
        varying |= {v for v, m in zip(eqn.outvars, moved, strict=True) if m}
    flags = [_is_var(v) and v in varying for v in jaxpr.outvars]
    return [_read(v, env) for v in jaxpr.outvars], flags


def _checkpoint(eqn: Any, inputs: list[Any], varies: list[bool]) -> list[Any]:
    """Evaluate a checkpoint, and outside of it what does not depend on the iterate."""
    rest, kept = _divide(_flat(eqn.params["jaxpr"], (), inputs, varies), varies)
    moving = [x for x, moves in zip(inputs, varies, strict=True) if moves]
    settings = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(rest, **settings)(moving, kept)
