"""Jacobian–vector products made of a pull-back, and their refusal.

f may hold kernels with a `jax.custom_vjp` of their own: its pull-back is all there is.
J v is then the transpose of v ↦ Jᵀ v. Where JAX cannot transpose a kernel, reverse mode
has to work all the same, although it traces J v (for the derivative of the derivative,
should that be asked for). So what cannot be made is replaced by a primitive that raises
when it is to be run, not when it is traced.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.extend as jex
import jax.tree_util as jtu
from jax.interpreters import ad, batching, mlir
from jaxtyping import PyTree

Linear = Callable[[PyTree], PyTree]

_MESSAGE = (
    "Forward mode (`jax.jvp`, `jax.jacfwd`, `jax.hessian`) and second derivatives "
    "through a solve need the products J v with the Jacobian of `fn`, which are made "
    "by transposing its pull-back. That cannot be done here, because of an operation "
    "in the backward rule of a `jax.custom_vjp` function in `fn` (a fused kernel or a "
    "callback, say): {reason}\n"
    "One `jax.grad` works. For forward mode or second derivatives, use a version of "
    "the function without its own rule."
)


def transpose(linear: Linear, example: PyTree, point: PyTree) -> Linear:
    """The transpose of `linear`, made when called.

    Args:
        linear: a linear function.
        example: an argument of it.
        point: what it depends on beside its argument.
    """

    def transposed(ct: PyTree) -> PyTree:
        try:
            return jax.linear_transpose(linear, example)(ct)[0]
        # JAX raises all kinds of errors where a rule is missing.
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), "no message")
            reason = f"{type(error).__name__}: {first_line}"
        return _refuse(ct, jax.eval_shape(lambda: example), point, reason)

    return transposed


def _refuse(ct: PyTree, like: PyTree, point: PyTree, reason: str) -> PyTree:
    """Something of the structure of `like`, linear in ct, that cannot be computed."""
    leaves, tree = jtu.tree_flatten(like)
    operands = jtu.tree_leaves(ct)
    avals = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    out = _refused.bind(
        *operands, *jtu.tree_leaves(point), linear=len(operands), avals=avals,
        reason=reason,
    )  # fmt: skip
    return jtu.tree_unflatten(tree, out)


_refused = jex.core.Primitive("refused")
_refused.multiple_results = True


def _raise(*_: Any, reason: str, **__: Any) -> Any:
    raise TypeError(_MESSAGE.format(reason=reason))


def _abstract(*_: Any, avals: Sequence[Any], **__: Any) -> list[Any]:
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in avals]


def _transposed(
    cts: Sequence[Any], *operands: Any, linear: int, avals: Any, reason: str
) -> list[Any]:
    inputs = operands[:linear]
    back = tuple((x.aval.shape, x.aval.dtype) for x in inputs)
    cts = [ad.instantiate_zeros(ct) for ct in cts]
    out = _refused.bind(
        *cts, *operands[linear:], linear=len(cts), avals=back, reason=reason
    )
    return [*out, *[None] * (len(operands) - linear)]


def _batched(
    operands: Sequence[Any], dims: Sequence[Any], *, avals: Sequence[Any], **params: Any
) -> tuple[list[Any], list[int]]:
    size = next(
        x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None
    )
    avals = tuple(((size, *shape), dtype) for shape, dtype in avals)
    return _refused.bind(*operands, avals=avals, **params), [0] * len(avals)


_refused.def_impl(_raise)
_refused.def_abstract_eval(_abstract)
ad.primitive_jvps[_refused] = lambda primals, tangents, **params: _raise(**params)
ad.primitive_transposes[_refused] = _transposed
batching.primitive_batchers[_refused] = _batched
mlir.register_lowering(_refused, _raise)
