"""The maps whose reversible gradients are checked on the device."""

import re
from typing import Any, NamedTuple

import numpy as np

from .. import _reversal_cases as random_cases
from .._reversal_mixing import KINDS
from .._reversal_pieces import Piece, Shape

BETAS = (0.5, 0.8, 0.95)
STEPS = (8, 32)
ROWS, BLOCK, IMAGE = (8, 64), (2, 16, 64), (2, 8, 8, 32)


class Check(NamedTuple):
    """A map, compiled once, and the solves that are checked.

    Attributes:
        name: of the map, its dtype and what else is special.
        case: the map, its shapes and dtypes, and how the solve is called.
        betas: values of β, known to the program only if there is but one.
        steps: numbers of steps, likewise.
        precision: of matrix products, as `jax.default_matmul_precision` has it; None:
            the platform's default (TF32 on NVIDIA GPUs, bfloat16 on TPUs).
    """

    name: str
    case: random_cases.Case
    betas: tuple[float, ...] = BETAS
    steps: tuple[int, ...] = STEPS
    precision: str | None = None

    @property
    def static(self) -> bool:
        """Whether β and the number of steps are fixed when the program is compiled."""
        return len(self.betas) == len(self.steps) == 1


def piece(kind: str, name: str, shape: Shape) -> Piece:
    """The first random piece of this kind whose name the pattern `name` fits."""
    for seed in range(1000):
        found = KINDS[kind](np.random.default_rng(seed), shape)
        if re.search(name, found.name):
            return found
    raise ValueError(f"`name` must fit a piece of kind {kind!r}; got {name!r}.")


class Recipe(NamedTuple):
    """outer(own·z + gain·piece(z) + x) of one leaf.

    `parts` are the kinds and names of the pieces, applied one after the other.
    """

    parts: tuple[tuple[str, str], ...]
    shape: Shape
    outer: str = "tanh"
    own: float = 0.3
    gain: float = 0.5

    def case(self, dtype: str, **changes: Any) -> random_cases.Case:
        """The map with states of this dtype, in which it computes too."""
        pieces = [piece(*part, self.shape) for part in self.parts]
        cell = random_cases.Cell(pieces, self.outer, self.own, self.gain)
        made = random_cases.Case(
            kind=self.parts[0][0], pick=0, seed=0, cells=[cell], shapes=[self.shape],
            states=[dtype], computed=[dtype], call="jit", beta="traced",
            number=0.8, span=(0.5, 0.95), steps=max(STEPS), tested=False,
            batch_ndim=0, start=0.1,
        )  # fmt: skip
        return made._replace(**changes)


def _one(kind: str, name: str, shape: Shape = ROWS, *rest: Any, **kept: Any) -> Recipe:
    return Recipe(((kind, name),), shape, *rest, **kept)


_TRANSFORMER = (("attention", "causal"), ("norm", "layer norm"), ("perceptron", ""))

# In the order in which they are checked: what models are made of comes first.
RECIPES = {
    "tanh": _one("dense", "dense", own=0.0, gain=0.9),
    "transformer block": Recipe(_TRANSFORMER, BLOCK, "rms norm", 0.5, 0.4),
    "convolution": _one("conv2d", "conv2d 3", IMAGE, "relu"),
    "layer norm": _one("norm", "layer norm"),
    "gated unit": _one("gated", "gated", ROWS, ""),
    "attention": _one("attention", "causal", BLOCK),
    "relu": _one("dense", "dense", ROWS, "relu", 0.0, 0.9),
    "scan in f": _one("control", "inner scan"),
    "Fourier filter": _one("fourier", "filter"),
    "sort": _one("sort", "^sort"),
    "bf16 product": _one("narrow", "in bfloat16"),
    "softmax": _one("softmax", "softmax over"),
    "affine": _one("dense", "dense", ROWS, ""),
    "post-norm perceptron": _one("perceptron", "", ROWS, "rms norm", 0.5, 0.4),
    "bilinear": _one("bilinear", ""),
    "convolution by channel": _one("conv2d", "by channel", IMAGE),
    "convolution in 1D": _one("conv1d", "conv1d 3", BLOCK),
    "group norm": _one("norm", "group norm"),
    "cumulative sum": _one("cumulative", "^(lax.)?cumsum"),
    "log-cumsum-exp": _one("cumulative", "logcumsumexp"),
    "top k": _one("sort", "top_k"),
    "cumulative maximum": _one("sort", "cummax"),
    "gather": _one("indexing", "gather"),
    "scatter": _one("indexing", "scatter"),
    "condition on z": _one("control", "cond of z"),
    "recurrence": _one("control", "recurrence"),
    "Newton in f": _one("control", "fori"),
    "power iteration": _one("spectral", "power iteration"),
    "complex Fourier": _one("fourier", "complex"),
    "elementwise": _one("elementwise", ""),
}
BFLOAT16 = (
    *("transformer block", "tanh", "convolution", "layer norm", "gated unit"),
    *("scan in f", "sort", "Fourier filter", "softmax", "relu"),
)
FLOAT16 = ("transformer block", "tanh")
# Without those that compute a softmax in float32 whatever their dtype is.
FLOAT64 = ("post-norm perceptron", "tanh", "convolution")
PRECISE = ("transformer block", "convolution", "tanh", "gated unit")
STATIC = ("transformer block", "tanh", "convolution", "gated unit")
QUICK = (
    *("tanh, float32", "layer norm, bfloat16", "convolution, float32"),
    *("sort, float32", "tanh, float32, β and N static"),
)


def checks() -> list[Check]:
    """All of them, those first that would be missed most if time ran out."""
    make = lambda name, dtype, **kept: RECIPES[name].case(dtype, **kept)
    plain = lambda names, dtype: [Check(f"{n}, {dtype}", make(n, dtype)) for n in names]
    first, others = list(RECIPES)[:8], list(RECIPES)[8:]
    precise = [
        Check(f"{n}, float32, full precision", make(n, "float32"), precision="highest")
        for n in PRECISE
    ]
    calls = [
        Check(f"tanh, float32, {call}", make("tanh", "float32", call=call))
        for call in ("vmap", "scan")
    ]
    batch = make("transformer block", "float32", batch_ndim=1)
    calls.append(Check("transformer block, float32, batch of problems", batch))
    return [
        *plain(first, "float32"),
        *plain(BFLOAT16[:4], "bfloat16"),
        *(_static(i, dtype) for dtype in ("float32", "bfloat16") for i in range(4)),
        *precise,
        *plain(others, "float32"),
        *plain(BFLOAT16[4:], "bfloat16"),
        *calls,
        *plain(FLOAT16, "float16"),
        *plain(FLOAT64, "float64"),
    ]


def _static(i: int, dtype: str) -> Check:
    """A check of one β and one number of steps; with i, all of them occur."""
    beta, steps = BETAS[i % 3], (16, 32, 8)[i % 3]
    case = RECIPES[STATIC[i]].case(dtype, beta="number", number=beta, steps=steps)
    return Check(f"{STATIC[i]}, {dtype}, β and N static", case, (beta,), (steps,))
