"""Random maps and random solves of them, for `reversal_maps.py`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax

from ._reversal_mixing import KINDS
from ._reversal_pieces import FUNCTIONS, Piece, Rng, Shape, elementwise, matrix, pick

MAPS = (*KINDS, "affine", "tree", "scalar", "centred")
SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 16, 17, 31, 32, 48, 64, 100, 128, 200, 300)
STEPS = (1, 1, 2, 2, 3, 4, 4, 5, 6, 7, 8, 8, 10, 12, 15, 16, 20, 24, 32, 48, 64, 100)
NUMBERS = (1 / 3, 0.5, 0.5, 0.75, 0.8, 0.8, 0.875, 0.9)  # β with a short 1 − β = p/q.
TESTED = {"float64": 1e-6, "float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
LANES = 3  # of a vmap, and solves in a scan
DEVICES = 4

OUTER: dict[str, Callable[[jax.Array], jax.Array]] = {
    "": lambda h: h,
    "tanh": jnp.tanh,
    "sin": jnp.sin,
    "relu": jax.nn.relu,
    "softsign": FUNCTIONS["softsign"],
    "rms norm": lambda h: h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-3),
}


class Cell(NamedTuple):
    """outer(own·z + gain·piece(z) + x) for one leaf."""

    pieces: list[Piece]
    outer: str
    own: float
    gain: float

    @property
    def name(self) -> str:
        inner = " > ".join(p.name for p in self.pieces)
        return f"{self.own} z + {self.gain} [{inner}] + x" + (
            f" > {self.outer}" if self.outer else ""
        )

    def inside(self, h: jax.Array, w: list[Any]) -> jax.Array:
        """What x is added to."""
        y = h
        for piece, weights in zip(self.pieces, w, strict=True):
            y = piece.apply(y, weights)
        return self.own * h + self.gain * y

    def __call__(self, h: jax.Array, x: jax.Array, w: list[Any]) -> jax.Array:
        return OUTER[self.outer](self.inside(h, w) + x)


class Case(NamedTuple):
    """A map, and how it is solved; `draw` fills it with numbers."""

    kind: str
    pick: int
    seed: int
    cells: list[Cell]
    shapes: list[Shape]
    states: list[str]  # dtypes of the leaves of z …
    computed: list[str]  # … and of x and the weights, in which f computes
    call: str
    beta: str  # "number", "traced", "channel" or "entry"
    number: float
    span: tuple[float, float]
    steps: int
    tested: bool
    batch_ndim: int
    start: float  # scale of z₀

    @property
    def lanes(self) -> tuple[int, ...]:
        """Leading axes of x that are solved one by one."""
        return (LANES,) if self.call in ("vmap", "scan") else ()

    def tree(self, leaves: list[Any]) -> Any:
        """The leaves in the structure of z."""
        return leaves[0] if self.kind != "tree" else dict(enumerate(leaves))

    def fn(self, z: Any, args: Any) -> Any:
        """The map; `args` is (x, weights). It computes in the dtypes of x."""
        x, w = args
        xs = jtu.tree_leaves(x)
        hs = [z.astype(x.dtype) for z, x in zip(jtu.tree_leaves(z), xs, strict=True)]
        if len(hs) > 1:
            xs = self._coupled(hs, xs)
        new = [
            cell(h, x, w).astype(z.dtype)
            for cell, h, x, w, z in zip(
                self.cells, hs, xs, w, jtu.tree_leaves(z), strict=True
            )
        ]
        return self.tree(new)

    def _coupled(self, hs: list[jax.Array], xs: list[jax.Array]) -> list[jax.Array]:
        """Each x, and the mean of each leaf, per problem of the batch."""
        dtype = jnp.result_type(*hs)
        inner = lambda h: tuple(range(self.batch_ndim, h.ndim))
        means = [jnp.tanh(h).mean(inner(h)).astype(dtype) for h in hs]
        mean = jnp.sum(jnp.stack(means), 0)
        grown = lambda x: mean.reshape(mean.shape + (1,) * (x.ndim - mean.ndim))
        return [x + 0.1 * grown(x).astype(x.dtype) for x in xs]

    @property
    def text(self) -> str:
        """All that was chosen."""
        leaves = [
            f"{s}{list(n)}" + (f" in {c}" if c != s else "")
            for s, n, c in zip(self.states, self.shapes, self.computed, strict=True)
        ]
        beta = f"β {self.number:.3g}"
        if self.beta != "number":
            beta = f"β {self.span[0]:.2g}–{self.span[1]:.2g} {self.beta}"
        parts = ["; ".join(cell.name for cell in self.cells), " + ".join(leaves)]
        parts += [self.call, beta, f"N {self.steps}" + " at most" * self.tested]
        parts += ["batch"] * self.batch_ndim
        return ", ".join(parts)

    def draw(self, index: int) -> tuple[Any, Any, Any, Any, Any]:
        """(z₀, x, weights, β, weights of the loss), in the dtypes of the solve."""
        rng = np.random.default_rng(
            [self.seed, MAPS.index(self.kind), self.pick, index]
        )
        z0, xs, ws, out = [], [], [], []
        for cell, shape, state, computed in zip(
            self.cells, self.shapes, self.states, self.computed, strict=True
        ):
            whole = (*self.lanes, *shape)
            weights = [piece.init(rng) for piece in cell.pieces]
            x = 0.7 * rng.normal(size=whole)
            if self.kind == "centred":
                x = _centred(rng, cell, weights, whole)
            first = whole if self.call == "vmap" else shape
            z0.append(_cast(self.start * rng.normal(size=first), state))
            xs.append(_cast(x, computed))
            ws.append(_cast(weights, computed))
            out.append(_cast(rng.normal(size=whole), state))
        return self.tree(z0), self.tree(xs), ws, self._betas(rng), self.tree(out)

    def _betas(self, rng: Rng) -> Any:
        """β as an argument of the compiled program, or None for a Python number."""
        if self.beta == "number":
            return None
        wide = "float64" if "float64" in self.states else "float32"
        uniform = lambda shape: _cast(rng.uniform(*self.span, shape), wide)
        if self.beta == "traced":
            return uniform(self.lanes)
        if self.beta == "channel":
            return self.tree([uniform(shape[-1:]) for shape in self.shapes])
        one = lambda s: s if len(s) < 2 else (s[0],) + (1,) * (len(s) - 1)
        return self.tree([uniform(one(shape)) for shape in self.shapes])


def _cast(tree: Any, dtype: Any) -> Any:
    return jtu.tree_map(lambda t: jnp.asarray(t, dtype), tree)


def _centred(rng: Rng, cell: Cell, weights: Any, shape: Shape) -> np.ndarray:
    """The x that puts the fixed point where some entries are tiny."""
    star = np.clip(rng.normal(size=shape), -2, 2) * 0.45
    size = 10.0 ** rng.uniform(-9, -2, shape) * rng.integers(2, size=shape)
    star = np.where(rng.random(shape) < 0.4, star * size, star)
    inside = cell.inside(jnp.asarray(star), _cast(weights, "float64"))
    return (np.arctanh(star) if cell.outer == "tanh" else star) - np.asarray(inside)


# Choices


def _shape(rng: Rng, kind: str, call: str, ndim: int | None = None) -> Shape:
    """A random shape that the kind of map admits; 1 to 4 axes."""
    smallest = 2 if kind in ("norm", "softmax", "sort", "cumulative", "fourier") else 1
    n = int(pick(rng, *(s for s in SIZES if s >= smallest)))
    batch = DEVICES if call == "mesh" else int(rng.integers(1, 6))
    small = lambda: int(rng.integers(2, 8))
    if kind == "attention":
        shape = (batch, int(rng.integers(2, 10)), int(pick(rng, 4, 8, 12, 16, 32)))
        return shape[1:] if call != "mesh" and rng.random() < 0.3 else shape
    if kind == "conv2d":
        channels = (int(pick(rng, 1, 3, 4, 8)),) if rng.random() < 0.7 else ()
        return (batch, small(), small(), *channels)
    if kind == "affine":
        return (int(rng.integers(1, 9)),)
    if kind == "scalar":
        return ()
    if ndim is None:
        chances = (0, 0.6, 0.25, 0.15) if call == "mesh" else (0.25, 0.4, 0.2, 0.15)
        ndim = 1 + int(rng.choice(4, p=chances))
    if ndim >= 3:
        n = min(n, 64)
    return (*(batch, small(), small())[: ndim - 1], n)


def _cell(rng: Rng, kind: str, shape: Shape, plain: bool) -> Cell:
    """A cell with a piece of the kind, often with functions around it."""
    if kind == "affine":
        n = shape[-1]
        init = lambda rng: matrix(rng, n, n)
        piece = Piece(f"W @ z {n}", lambda h, w: w @ h, init)
        return Cell([piece], "", 0.0, float(pick(rng, 0.6, 0.9)))
    if kind == "scalar":
        kind = "elementwise"
    if kind == "centred":
        names = ["dense", "perceptron", "gated", "bilinear", "elementwise", "fourier"]
        kind = pick(rng, *names, *["conv1d"] * (len(shape) > 1), "cumulative")
    pieces = [KINDS[kind](rng, shape)]
    if not plain and rng.random() < 0.5:
        pieces.insert(int(rng.integers(2)), elementwise(rng, shape))
    outer = pick(rng, "", "tanh") if plain else pick(rng, *OUTER)
    if outer == "rms norm" and (not shape or shape[-1] < 3):
        outer = "tanh"
    own = float(pick(rng, 0.0, 0.3, 0.5))
    return Cell(pieces, outer, own, float(pick(rng, 0.2, 0.3, 0.4)))


def _dtypes(rng: Rng, kind: str, leaves: int) -> tuple[list[str], list[str]]:
    names = ("float32", "float64", "bfloat16", "float16")
    choose = lambda: str(rng.choice(names, p=(0.61, 0.13, 0.13, 0.13)))
    states = (
        [choose()] * leaves if rng.random() < 0.5 else [choose() for _ in range(leaves)]
    )
    if kind == "narrow":
        states = ["float32"] * leaves
    wide = bool(rng.random() < 0.5)  # f computes in 32 bits, whatever the state is
    narrow = ("bfloat16", "float16")
    return states, ["float32" if wide and s in narrow else s for s in states]


def case(seed: int, kind: str, index: int) -> Case:
    """The case of this kind with this number; always the same one for a seed."""
    rng = np.random.default_rng([seed, MAPS.index(kind), index])
    flat = kind in ("affine", "scalar")
    calls = ("plain", "jit", "vmap", "scan", "checkpoint", "mesh")
    chances = np.array((0.18, 0.27, 0.18, 0.18, 0.09, 0.0 if flat else 0.1))
    call = str(rng.choice(calls, p=chances / chances.sum()))
    plain = kind == "centred" or bool(rng.random() < 0.4)
    shapes: list[Shape]
    if kind == "tree":
        inner = [str(pick(rng, "elementwise", "dense", "norm", "conv1d", "sort"))]
        inner += [str(pick(rng, "elementwise", "dense", "gated", "cumulative"))]
        inner += ["elementwise"] * int(rng.integers(3))
        # One batch for all: the leaves agree in their first axis.
        batch = DEVICES if call == "mesh" else int(rng.integers(1, 6))
        shapes = [
            (batch, *_shape(rng, k, "mesh", 2 + i % 2)[1:]) for i, k in enumerate(inner)
        ]
    else:
        inner, shapes = [kind], [_shape(rng, kind, call)]
    cells = [_cell(rng, k, s, plain) for k, s in zip(inner, shapes, strict=True)]
    mixes_rows = kind == "attention" and len(shapes[0]) == 2
    batched = not mixes_rows and all(len(s) > 1 for s in shapes)
    batch_ndim = int(batched and rng.random() < 0.5)
    if kind == "tree" and not batch_ndim and call != "mesh" and rng.random() < 0.5:
        shapes[-1], cells[-1] = (), _cell(rng, "scalar", (), plain)
    states, computed = _dtypes(rng, kind, len(cells))
    forms = ("number", "traced", "channel", "entry")
    form = str(rng.choice(forms, p=(0.5, 0.2, 0.15, 0.15)))
    low, high = sorted(rng.uniform(0.3, 0.95, 2))
    number = float(
        pick(rng, *NUMBERS) if rng.random() < 0.6 else rng.uniform(0.3, 0.95)
    )
    if form == "channel" and not all(shapes):
        form = "traced"
    # With `own`, a gain of 0.4 and a Lipschitz constant about 1: contractions.
    tested = bool(rng.random() < 0.2)
    return Case(
        kind, index, seed, cells, shapes, states, computed, call, form, number,
        (float(low), float(high)), 100 if tested else int(pick(rng, *STEPS)), tested,
        batch_ndim, float(pick(rng, 0.0, 0.1, 1.0)),
    )  # fmt: skip
