"""Convolutions that XLA computes fast on the CPU in loops as well.

XLA on the CPU hands a convolution to its fast kernel in one layout only: batch, space,
channels for the operand, space, in, out for the kernel. A pass brings convolutions into
that layout, but only those of the entry computation, so that neither a convolution in
PyTorch's layout nor any gradient of a convolution is fast in a loop:
https://github.com/openxla/xla/blob/main/xla/service/cpu/conv_canonicalization.cc
Measured on two cores, 16 channels, 3 x 3, (64, 16, 8, 8), per convolution: 4.2 ms in a
loop and 0.3 ms outside, its kernel's gradient 20 ms and 0.3 ms.

So `canonical` replaces the primitive of every convolution by one that differs in how it
is lowered for CPUs: in that layout, between transpositions. Its derivatives and
batches are made of itself. Everything derived from a function that has been rewritten
once is therefore fast in loops too, and on other platforms nothing changes.
"""

import functools as ft
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.extend as jex
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.extend import linear_util as lu
from jax.extend.core.primitives import conv_general_dilated_p
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, PyTree

# Below this number of input times output channels of a group, XLA's plain loops are
# as fast as its kernel, and for one or two channels up to 15 times faster.
_FEW_CHANNELS = 32

# XLA's kernel for CPUs has these alone (bfloat16 is computed in float32).
_FAST_DTYPES = {"float16", "bfloat16", "float32"}


def canonical(fn: Callable) -> Callable:
    """`fn`, with convolutions that are fast on the CPU in loops as well.

    Calls, checkpoints, loops, branches and the rules of `jax.custom_jvp` and
    `jax.custom_vjp` functions with convolutions are entered. What is not: a
    `jax.custom_vjp` function without convolutions whose rules have some.

    Args:
        fn: any function of pytrees. It is traced once per call.

    Returns:
        A function with the values and derivatives of `fn`, up to rounding on CPUs.
    """

    def call(*args: PyTree) -> PyTree:
        traced, struct, static = eqx.filter_make_jaxpr(fn)(*args)
        arrays = [x for x in jtu.tree_leaves(args) if eqx.is_array(x)]
        leaves = jex.core.jaxpr_as_fun(rewrite(traced))(*arrays)
        return eqx.combine(
            jtu.tree_unflatten(jtu.tree_structure(struct), leaves), static
        )

    return call


def rewrite(tree: PyTree) -> PyTree:
    """The same for jaxprs, open or closed, and pytrees that have some as leaves.

    Without convolutions, what is returned is what was given.
    """
    return jtu.tree_map(
        lambda x: _rewrite(x) if _is_jaxpr(x) else x, tree, is_leaf=_is_jaxpr
    )


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, jex.core.Jaxpr | jex.core.ClosedJaxpr)


def _rewrite(jaxpr: Any) -> Any:
    # From JAX 0.12 on, open and closed jaxprs are one class, each its own `jaxpr`.
    within = getattr(jaxpr, "jaxpr", jaxpr)
    if within is not jaxpr:
        inner = _rewrite(within)
        return jaxpr if inner is within else jaxpr.replace(jaxpr=inner)
    eqns = [_rewrite_eqn(eqn) for eqn in jaxpr.eqns]
    same = all(new is old for new, old in zip(eqns, jaxpr.eqns, strict=True))
    return jaxpr if same else jaxpr.replace(eqns=eqns)


def _rewrite_eqn(eqn: Any) -> Any:
    if eqn.primitive is conv_general_dilated_p:
        return eqn.replace(primitive=_convolution_p)
    changed = {}
    for name, param in eqn.params.items():
        # Other parameters may be anything, with an `==` of their own.
        if any(_is_jaxpr(x) for x in jtu.tree_leaves(param, is_leaf=_is_jaxpr)):
            new = rewrite(param)
            leaves = (jtu.tree_leaves(x, is_leaf=_is_jaxpr) for x in (new, param))
            if any(a is not b for a, b in zip(*leaves, strict=True)):
                changed[name] = new
    if not changed:
        return eqn
    for name, wrap in _RULES.items():
        if eqn.params.get(name) is not None:
            changed[name] = wrap(eqn.params[name])
    return eqn.replace(params={**eqn.params, **changed})


# The functions that are parameters of equations beside jaxprs


def _policy(policy: Callable) -> Callable:
    """A policy of `jax.checkpoint`, which may ask for JAX's convolution by identity."""

    def call(primitive: Any, *args: Any, **params: Any) -> Any:
        plain = conv_general_dilated_p if primitive is _convolution_p else primitive
        return policy(plain, *args, **params)

    return call


@lu.transformation2
def _traced_rule(rule: Callable, *args: Any) -> Any:
    # Both kinds return a jaxpr, its constants, and what else there is.
    jaxpr, *rest = rule(*args)
    return rewrite(jaxpr), *rest


@lu.transformation2
def _flat_rule(rule: Callable, *args: Any) -> Any:
    return canonical(rule)(*args)


_RULES: dict[str, Callable] = {
    "policy": _policy,
    "jvp_jaxpr_fun": _traced_rule,
    "fwd_jaxpr_thunk": _traced_rule,
    "bwd": _flat_rule,
}


# The primitive. It has the name of JAX's, since others recognise convolutions by that.


_convolution_p = jex.core.Primitive(conv_general_dilated_p.name)


def _fast(lhs: Array, rhs: Array, **params: Any) -> Array:
    """The convolution in canonical layout, if that is faster."""
    if not _is_worth_it(lhs, rhs, **params):
        return conv_general_dilated_p.bind(lhs, rhs, **params)
    numbers, groups = params["dimension_numbers"], params["batch_group_count"]
    l, r, o = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    lhs = lax.transpose(lhs, (l[0], *l[2:], l[1]))  # batch, *space, in
    rhs = lax.transpose(rhs, (*r[2:], r[1], r[0]))  # *space, in, out
    if groups > 1:
        # As groups of features: XLA expands those of the batch to a convolution of
        # all with all. (groups x batch, *space, in) -> (batch, *space, groups x in)
        batch, *space, features = lhs.shape
        lhs = lhs.reshape(groups, batch // groups, *space, features)
        lhs = jnp.moveaxis(lhs, 0, -2)
        lhs = lhs.reshape(batch // groups, *space, groups * features)
        params = {**params, "feature_group_count": groups, "batch_group_count": 1}
    n = lhs.ndim
    order = (0, n - 1, *range(1, n - 1))
    layout = type(numbers)(order, (n - 1, n - 2, *range(n - 2)), order)
    out = conv_general_dilated_p.bind(
        lhs, rhs, **{**params, "dimension_numbers": layout}
    )
    # Axis o[i] of the result is axis order[i] of the canonical one.
    return lax.transpose(out, [order[o.index(axis)] for axis in range(n)])


def _is_worth_it(lhs: Array, rhs: Array, **params: Any) -> bool:
    fast = lhs.dtype.name in _FAST_DTYPES and rhs.dtype.name in _FAST_DTYPES
    if not fast or params.get("out_sharding") is not None:
        return False
    # Gradients of the kernels of grouped convolutions are up to 100 times slower.
    if params["batch_group_count"] > 1:
        return True
    out, into, *_ = params["dimension_numbers"].rhs_spec
    per_group = rhs.shape[out] // params["feature_group_count"] * rhs.shape[into]
    return per_group >= _FEW_CHANNELS and math.prod(lhs.shape) > 0


def _transposed(index: int, ct: Array, *operands: Any, **params: Any) -> Array:
    """The cotangent of one operand, the other being known."""

    def pull(ct: Array, known: Array) -> Array:
        def linear(x: Array) -> Array:
            both = (x, known) if index == 0 else (known, x)
            return conv_general_dilated_p.bind(*both, **params)

        return jax.linear_transpose(linear, operands[index].aval)(ct)[0]

    return canonical(pull)(ct, operands[1 - index])


def _batched(operands: Any, dims: Any, **params: Any) -> tuple[Array, int]:
    convolve = ft.partial(conv_general_dilated_p.bind, **params)
    return canonical(jax.vmap(convolve, in_axes=dims))(*operands), 0


_convolution_p.def_impl(conv_general_dilated_p.bind)
_convolution_p.def_effectful_abstract_eval(conv_general_dilated_p.abstract_eval)
ad.defbilinear(_convolution_p, ft.partial(_transposed, 0), ft.partial(_transposed, 1))
batching.primitive_batchers[_convolution_p] = _batched
for _platform, _lowered in ((None, conv_general_dilated_p.bind), ("cpu", _fast)):
    mlir.register_lowering(
        _convolution_p,
        mlir.lower_fun(_lowered, multiple_results=False),
        platform=_platform,
    )
