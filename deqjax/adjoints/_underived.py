"""A barrier before what has no derivative: the statistics and the state of a solve.

Most of them are integers, or found under `stop_gradient`, and JAX would take them for
constants without a word. The barrier is the identity, and depends on all that the solve
depends on: if that is differentiated, so are they. Pulling a cotangent back through it
is an error that names the statistic; a tangent pushed forward through it is NaN, since
forward mode does not tell what is used from what is not.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

_MESSAGE = (
    "`{name}` has no derivative: statistics and states of a solve say how it went. Use "
    "`jax.lax.stop_gradient` where you want a constant, in what a loop carries too, or "
    "compute it from `sol.value` (a residual, say) where you want its derivative."
)


def underived(x: PyTree, origin: PyTree) -> PyTree:
    """x, whose floats cannot be differentiated by anything that `origin` depends on.

    Args:
        x: a pytree; its paths are the names in the error.
        origin: what x is computed from.
    """
    floats, rest = eqx.partition(x, eqx.is_inexact_array)
    paths, structure = jtu.tree_flatten_with_path(floats)
    if not paths:
        return x
    names = tuple(jtu.keystr(path) for path, _ in paths)
    origins = jtu.tree_leaves(eqx.filter(origin, eqx.is_inexact_array))
    out = _barrier.bind(*(leaf for _, leaf in paths), *origins, names=names)
    return eqx.combine(jtu.tree_unflatten(structure, out), rest)


_barrier = jex.core.Primitive("underived")
_barrier.multiple_results = True
_tangent = jex.core.Primitive("underived_tangent")
_tangent.multiple_results = True


def _same(*operands: Any, names: Sequence[str]) -> list[Any]:
    return list(operands[: len(names)])


def _push(
    primals: Sequence[Any], tangents: Sequence[Any], *, names: Sequence[str]
) -> tuple[list[Any], list[Any]]:
    out = _barrier.bind(*primals, names=names)
    moving = [t for t in tangents if not isinstance(t, ad.Zero)]
    avals = tuple(jax.typeof(x) for x in out)
    return out, _tangent.bind(*moving, avals=avals, names=names)


def _batched(
    operands: Sequence[Any], dims: Sequence[Any], *, names: Sequence[str]
) -> tuple[list[Any], list[Any]]:
    return _barrier.bind(*operands, names=names), list(dims[: len(names)])


def _nans(*_: Any, avals: Sequence[Any], names: Sequence[str]) -> list[Any]:
    return [jnp.full(aval.shape, jnp.nan, aval.dtype) for aval in avals]


def _push_tangent(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[list[Any], list[Any]]:
    moving = [t for t in tangents if not isinstance(t, ad.Zero)]
    return _tangent.bind(*primals, **params), _tangent.bind(*moving, **params)


def _refuse(cts: Sequence[Any], *_: Any, names: Sequence[str], **__: Any) -> Any:
    asked = (n for n, ct in zip(names, cts, strict=True) if not isinstance(ct, ad.Zero))
    raise TypeError(_MESSAGE.format(name=f"sol{next(asked)}"))


def _batched_tangent(
    operands: Sequence[Any], dims: Sequence[Any], **params: Any
) -> tuple[list[Any], list[Any]]:
    # The same for every lane.
    out = _tangent.bind(*operands, **params)
    return out, [batching.not_mapped] * len(out)


_barrier.def_impl(_same)
_barrier.def_abstract_eval(_same)
ad.primitive_jvps[_barrier] = _push
batching.primitive_batchers[_barrier] = _batched
mlir.register_lowering(_barrier, mlir.lower_fun(_same, multiple_results=True))
_tangent.def_impl(_nans)
_tangent.def_abstract_eval(lambda *_, avals, names: list(avals))
ad.primitive_jvps[_tangent] = _push_tangent
ad.primitive_transposes[_tangent] = _refuse
batching.primitive_batchers[_tangent] = _batched_tangent
mlir.register_lowering(_tangent, mlir.lower_fun(_nans, multiple_results=True))
