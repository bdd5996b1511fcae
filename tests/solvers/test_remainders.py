"""What a half step loses of a state, against NumPy's and Python's own integers."""

import functools as ft
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deqjax.solvers import _remainders
from deqjax.solvers._remainders import Remainders
from deqjax.solvers._reversible import relax

pytestmark = pytest.mark.optimised

BITS = (4, 8, 16)
DTYPES = ("float32", "bfloat16", "float16", "float64")
BETAS = (0.3, 0.5, 0.8, 0.95)
# Binary digits; those below the typical size of a row that a unit keeps, and how many
# such units two evaluations may be apart; the same below an entry with its own unit.
DIGITS = {"float32": 24, "bfloat16": 8, "float16": 11, "float64": 53}
SHARED = {
    "float32": (21, 16),
    "bfloat16": (8, 12),
    "float16": (11, 12),
    "float64": (50, 16),
}
OWN = {"float32": (24, 8), "bfloat16": (8, 2), "float16": (11, 2), "float64": (53, 8)}
MOST = 53
WIDTH = 13


def finfo(name):
    return ml_dtypes.finfo(name) if name == "bfloat16" else np.finfo(name)


def array(x, name):
    return np.asarray(x, ml_dtypes.bfloat16 if name == "bfloat16" else name)


def wide(x):
    """In 64 binary digits, which hold all that is exact below."""
    return np.asarray(x).astype(np.float64).astype(np.longdouble)


def is_normal(x, name):
    """Processors take what is no normal number for 0."""
    return (abs(wide(x)) >= float(finfo(name).tiny)) | (wide(x) == 0)


# --- half steps of all dtypes and bits, one program -----------------------------------


@jax.jit
def half(betas, a, f):
    return relax(a, f, betas)


@ft.partial(jax.jit, static_argnums=0)
def record(bits, betas, a, b, f, new):
    residues = Remainders(betas, a, {"default": MOST}, bits, 0)
    found = residues.record(a, b, f, new)
    codes = jax.tree.map(
        lambda c, x: _remainders._unpack(c, bits, x.shape), found.codes, a
    )
    return found, codes, residues.shared_unit, residues.own_unit


@ft.partial(jax.jit, static_argnums=0)
def undo(bits, betas, b, f, new, found, start, at_start):
    residues = Remainders(betas, b, {"default": MOST}, bits, 0)
    return residues.undo(b, f, new, betas, found, start, at_start)


def cases(name, rng):
    """Rows (a, b, f) of every kind, by name."""
    far = {"float16": 1e3}.get(name, 1e8)
    normal = lambda: rng.normal(size=(3, WIDTH))
    one, half = np.ones(WIDTH), np.ones(WIDTH)
    one[3], half[::2] = far, far
    tiny = float(finfo(name).tiny)
    step = np.arange(WIDTH)
    powers = 2.0 ** (step % 5 - 2) * (-1.0) ** step
    down = powers * (1 - 2.0 ** -DIGITS[name])
    decayed = 2.0 ** np.maximum(-3.0 * step, np.log2(tiny) / 2)
    off = np.where(step % 2, 1, 0)
    rows = {
        "normal": normal(),
        "negative": -abs(normal()),
        "from zero": normal() * [[0], [0], [1]],
        "from small": normal() * [[1e-3], [1e-3], [1]],
        "from large": normal() * [[1e3], [1e3], [1]],
        "nothing": 0 * normal(),
        "to zero": normal() * [[0.1], [0.1], [0]],
        "some zeros": normal() * off,
        "one large entry": normal() * one,
        "half of the entries large": normal() * half,
        "powers": np.stack([powers, down, powers]),
        "below powers": np.stack([down, powers, down]),
        "large powers": np.stack([powers, powers, powers * one]),
        "decaying": np.stack([decayed, decayed / 2, off * rng.normal(size=WIDTH)]),
        "denormal": 0.3 * tiny * normal(),
        "smallest": tiny * (2 + abs(normal())),
        "constant": np.ones((3, WIDTH)),
    }
    for scale in (1e-2, 1e2) if name == "float16" else (1e-20, 1e-6, 1e6, 1e20):
        rows[f"times {scale:g}"] = scale * normal()
    return rows


class Rows(NamedTuple):
    """Half steps of one dtype, row by row."""

    kinds: np.ndarray
    betas: np.ndarray
    a: np.ndarray
    b: np.ndarray
    f: np.ndarray


def batch(name):
    """Every kind with every β, several times."""
    rng = np.random.default_rng(0)
    kinds, betas, out = [], [], []
    for beta in BETAS:
        for _ in range(4):
            for kind, row in cases(name, rng).items():
                kinds.append(kind)
                betas.append(beta)
                out.append(row)
    a, b, f = array(np.moveaxis(np.stack(out), 1, 0), name)
    betas = np.asarray(betas, "float64" if name == "float64" else "float32")
    # In every third row one β per entry.
    betas = np.repeat(betas[:, None], WIDTH, 1)
    betas[::3] = rng.uniform(0.2, 0.96, betas[::3].shape)
    return Rows(np.array(kinds), betas, a, b, f)


class Halves(NamedTuple):
    """What is recorded of half steps, and what NumPy makes of it."""

    rows: dict
    trees: tuple  # betas, a, b, f, new, records
    new: dict
    unit: dict
    modulus: dict
    shares: dict
    n: dict


@ft.cache
def all_halves():
    """By bits."""
    rows = {name: batch(name) for name in DTYPES}
    betas, a, b, f = (
        {k: getattr(r, x) for k, r in rows.items()} for x in Rows._fields[1:]
    )
    news = half(betas, a, f)
    out = {}
    for bits in BITS:
        found, codes, shared, own = record(bits, betas, a, b, f, news)
        trees = betas, a, b, f, news, found
        parts = {x: {} for x in ("unit", "modulus", "shares", "n")}
        for name in DTYPES:
            check_unit(SHARED[name], betas[name], shared[name], 3 * 2 ** (bits - 2))
            check_unit(OWN[name], betas[name], own[name], 2 ** (bits - 3))
            each = reference(bits, name, trees, codes, shared, own)
            for part, value in zip(parts, each, strict=True):
                parts[part][name] = value
        out[bits] = Halves(rows, trees, {k: wide(x) for k, x in news.items()}, **parts)
    return out


@pytest.fixture
def halves(x64):
    return all_halves()


def check_unit(promise, beta, unit, modulus):
    """Half of the capacity for evaluations as far apart as is promised; no coarser."""
    finest, apart = promise
    coarse = wide(unit) + finest
    assert (coarse >= 0).all()
    off = (0.5 + apart * wide(beta)) / (1 - wide(beta)) / 2.0**coarse
    assert (off <= modulus / 4 * (1 + 1e-5)).all()
    assert ((off > modulus / 8 * (1 - 1e-5)) | (coarse == 0)).all()


def reference(bits, name, trees, codes, shared_unit, own_unit):
    """The unit, modulus and multiple of every entry; the code is checked."""
    _, a, b, f, new, found = trees
    modulus, own_modulus = 3 * 2 ** (bits - 2), 2 ** (bits - 3)
    code, size = np.asarray(codes[name]), np.asarray(found.sizes[name]).astype(int)
    assert found.codes[name].dtype == ("uint16" if bits == 16 else "uint8")
    assert found.codes[name].shape[1] == ((WIDTH + 1) // 2 if bits == 4 else WIDTH)
    assert (code < 2**bits).all()
    shares = code < modulus
    # States of 16 bits are computed with in float32, whose exponents count.
    real = "float64" if name == "float64" else "float32"
    info = np.finfo(real)
    least = int(info.minexp) + DIGITS[name]
    largest = np.max(np.abs([x[name].astype(real) for x in (b, f, new)]), 0)
    exponent = np.where(largest > 0, np.frexp(largest)[1] - 1, least - 1)
    own = np.maximum(exponent + 1, least) + np.asarray(own_unit[name])
    exponents = np.where(shares, size + np.asarray(shared_unit[name]), own)
    unit = np.ldexp(np.longdouble(1), exponents)
    n = np.rint(wide(a[name]) / unit)
    # In Python's integers, of any length.
    digit = np.where(shares, code, (code - modulus) % own_modulus)
    m = np.where(shares, modulus, own_modulus)
    known = is_normal(a[name], name)
    want = [int(i) % int(j) for i, j in zip(n[known], m[known], strict=True)]
    np.testing.assert_array_equal(digit[known], want)
    parity = (code - modulus) // own_modulus
    assert (parity == exponent % 2)[~shares & (largest >= info.tiny)].all()
    return unit, m, shares, n


def going_back(bits, h, f, start=None, at_start=False):
    betas, a, b, _, new, found = h.trees
    start = jax.tree.map(jnp.zeros_like, a) if start is None else start
    states, repairs = undo(bits, betas, b, f, new, found, start, jnp.array(at_start))
    return {k: wide(x) for k, x in states.items()}, {
        k: np.asarray(x) for k, x in repairs.items()
    }


def guess(h, f, name):
    """(1 / Δ) (a' − β f) / (1 − β), and how far floats may be off."""
    beta = wide(h.trees[0][name])
    f = wide(f[name])
    eps = 2.0**-52 if name == "float64" else 2.0**-23
    exact = (h.new[name] - beta * f) / (1 - beta) / h.unit[name]
    slack = 3 * eps * (abs(h.new[name]) + abs(f)) / (1 - beta) / h.unit[name]
    return exact, slack + 2 * eps * abs(exact) + 1e-3


@pytest.mark.parametrize("bits", BITS)
def test_states_are_found_again_to_the_unit(bits, halves):
    h = halves[bits]
    states, repairs = going_back(bits, h, h.trees[3])
    for name in DTYPES:
        want = h.n[name] * h.unit[name]
        a = wide(h.trees[1][name])
        normal = is_normal(a, name)
        np.testing.assert_array_equal(states[name][normal], want[normal])
        assert (abs(states[name] - a)[~normal] <= h.unit[name][~normal]).all()
        exact, slack = guess(h, h.trees[3], name)
        predicted = abs(h.n[name] - exact) / (h.modulus[name] / 2)
        apart = abs(repairs[name] - predicted) <= slack / (h.modulus[name] / 2)
        assert apart[normal & is_normal(h.trees[3][name], name)].all()
        # Nothing but roundings is repaired, that to the unit among them.
        assert (repairs[name] <= 0.5 + 1 / h.modulus[name])[normal].all()


@pytest.mark.parametrize("bits", BITS)
def test_units_are_as_fine_as_the_row_allows(bits, halves):
    h = halves[bits]
    for name in DTYPES:
        rows = h.rows[name]
        kinds = {"normal", "one large entry", "constant", "times 1e+20", "times 0.01"}
        plain = np.isin(rows.kinds, list(kinds))[:, None]
        f = abs(wide(rows.f))
        typical = np.median(f, 1, keepdims=True)
        largest = np.maximum(np.maximum(f, abs(h.new[name])), abs(wide(rows.b)))
        for shares, size, (digits, apart) in (
            (True, 4 * typical, SHARED[name]),
            (False, 2 * largest, OWN[name]),
        ):
            off = (0.5 + apart * rows.betas) / (1 - rows.betas)
            coarse = np.maximum(1, 2 * off / (h.modulus[name] / 4))
            fine = h.unit[name] <= size * 2.0**-digits * coarse
            assert fine[plain & (h.shares[name] == shares)].all()
        # What is far above its row has a unit of its own.
        alone = ~h.shares[name][rows.kinds == "one large entry"]
        assert alone[:, 3].mean() > 0.9
        assert alone[:, :3].mean() < 0.05


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("part", [0.25, 0.5, 0.9, 1.1, 1.7, 2.6])
def test_a_disturbed_evaluation_is_repaired_within_the_capacity(bits, part, halves):
    h = halves[bits]
    rng = np.random.default_rng(1)
    f = {}
    for name in DTYPES:
        beta, (exact, _) = wide(h.trees[0][name]), guess(h, h.trees[3], name)
        sign = rng.choice([-1, 1], exact.shape)
        # From where the guess is, so that it is off by this part of the capacity.
        move = h.n[name] + sign * part * h.modulus[name] / 2 - exact
        move = np.where(h.shares[name], move, 0)
        moved = wide(h.trees[3][name]) - move * h.unit[name] * (1 - beta) / beta
        with np.errstate(over="ignore"):
            f[name] = array(moved.astype("float64"), name)
    states, repairs = going_back(bits, h, f)
    for name in DTYPES:
        exact, slack = guess(h, f, name)
        off, capacity = abs(exact - h.n[name]), h.modulus[name] / 2
        normal = is_normal(h.trees[1][name], name) & is_normal(f[name], name)
        normal &= h.shares[name] & np.isfinite(f[name].astype("float32"))
        inside = normal & (off <= capacity - slack)
        beyond = normal & (off >= capacity + slack)
        n = states[name] / h.unit[name]
        np.testing.assert_array_equal(n[inside], h.n[name][inside])
        predicted = off / capacity
        assert (abs(repairs[name] - predicted) <= slack / capacity)[inside].all()
        # Off by a multiple of the modulus; found by nobody, but no other number.
        lost = (n - h.n[name])[beyond] / h.modulus[name][beyond]
        rounding = abs(n)[beyond] * 2.0 ** -DIGITS[name] / h.modulus[name][beyond]
        assert (abs(lost - np.rint(lost)) <= rounding).all()
        assert (abs(lost) + rounding > 0.9).all()
        assert (abs(lost) > 0.9).sum() >= 0.99 * lost.size
        if part < 1:
            assert inside.sum() > 0.5 * normal.sum()
        else:
            assert beyond.sum() > 0.5 * normal.sum()


@pytest.mark.parametrize("ulps", [1, 2])
def test_sizes_next_to_a_power_of_two_are_settled_by_the_parity(ulps, x64):
    """The unit of a large entry, where the two evaluations are on either side of 2ᵏ."""
    for name in DTYPES:
        step = 2.0 ** -DIGITS[name]
        z = np.ones((4, 9))
        z[:, 4] = [2**7, -(2**8), 2**9, -(2**10)]
        below, above = z.copy(), z.copy()
        below[:, 4] *= 1 - ulps * step
        above[:, 4] *= 1 + 2 * ulps * step
        below, above, a, b = (array(x, name) for x in (below, above, 0.9 * z, 0.8 * z))
        for f, g in ((below, above), (above, below), (above, above), (below, below)):
            new = half(0.5, a, f)
            found, codes, *_ = record(8, 0.5, a, b, f, new)
            assert (codes[:, 4] >= 192).all()
            state, repair = undo(8, 0.5, b, g, new, found, a, jnp.array(False))
            # Half a unit, of which this entry has three more digits to give up.
            off = abs(wide(state) - wide(a)) / abs(wide(a))
            assert off.max() <= 8 * 2.0 ** -DIGITS[name]
            assert float(jnp.max(repair)) <= 0.75


def test_the_start_is_known(halves):
    bits = 8
    h = halves[bits]
    a, f = h.trees[1], h.trees[3]
    states, _ = going_back(bits, h, f, a, True)
    for name in DTYPES:
        np.testing.assert_array_equal(states[name], wide(a[name]))
    # A start that is another one is not taken for this one.
    other = {
        k: array((wide(a[k]) + 3 * h.unit[k]).astype("float64"), k) for k in DTYPES
    }
    states, _ = going_back(bits, h, f, other, True)
    for name in DTYPES:
        normal = is_normal(a[name], name)
        there = wide(other[name])
        # Where the state has as many digits.
        apart = normal & (abs(there - wide(a[name])) > h.unit[name])
        want = (h.n[name] * h.unit[name])[apart]
        assert apart.sum() > 0.5 * normal.sum()
        np.testing.assert_array_equal(states[name][apart], want)


def test_rows_that_are_no_numbers_spoil_only_themselves(halves):
    bits = 8
    h = halves[bits]
    betas, a, b, f, _, _ = h.trees
    clean, _ = going_back(bits, h, f)
    spoilt = {}
    for name in DTYPES:
        spoilt[name] = np.array(f[name])
        spoilt[name][1::7, 2] = np.nan
        spoilt[name][4::7, 5] = np.inf
    new = half(betas, a, spoilt)
    found, *_ = record(bits, betas, a, b, spoilt, new)
    states, repairs = undo(bits, betas, b, spoilt, new, found, a, jnp.array(False))
    for name in DTYPES:
        bad = np.zeros(len(a[name]), bool)
        bad[1::7] = bad[4::7] = True
        np.testing.assert_array_equal(wide(states[name])[~bad], clean[name][~bad])
        for rows, entry in ((slice(1, None, 7), 2), (slice(4, None, 7), 5)):
            assert not np.isfinite(wide(states[name])[rows, entry]).any()
            assert not (np.asarray(repairs[name])[rows, entry] <= 1).any()


def test_numbers_of_lower_precision_in_f(x64):
    """A state of 32 bits and products of bfloat16, which are off by their roundings."""
    rng = np.random.default_rng(5)
    a, b, f, noise = (jnp.float32(rng.normal(size=(40, 24))) for _ in "abfn")
    off = f * (1 + 2.0**-8 * jnp.tanh(noise))

    @ft.partial(jax.jit, static_argnums=0)
    def run(digits, beta):
        residues = Remainders(beta, a, {"default": digits}, 8, 0)
        new = relax(a, f, beta)
        found = residues.record(a, b, f, new)
        return residues.undo(b, off, new, beta, found, a, jnp.array(False))

    for beta in map(jnp.float32, (0.5, 0.9)):
        state, repair = run(8, beta)
        assert 0.02 < float(jnp.max(repair)) <= 0.5
        # To the resolution that such evaluations have.
        assert float(jnp.max(jnp.abs(state - a))) <= 2.0**-6 / (1 - beta)
        lost, _ = run(24, beta)
        assert float(jnp.max(jnp.abs(lost - a))) > 2.0**-8


@pytest.mark.parametrize(
    ("precision", "cuda", "tpu"),
    [(None, 11, 8), ("default", 11, 8), ("high", 11, 16), ("highest", 24, 24)],
)
def test_products_have_the_digits_of_their_platform(precision, cuda, tpu):
    """NVIDIA's GPUs take TF32 for products of float32, TPUs bfloat16."""
    w, z = jnp.ones((3, 3)), jnp.ones((2, 3))

    def fn(z, w):
        return jax.lax.map(lambda x: jnp.dot(x, w, precision=precision), z)

    digits = _remainders.least_digits(fn, z, w)
    assert digits == {"cuda": cuda, "tpu": tpu, "default": 24}
    half = _remainders.least_digits(fn, z.astype("bfloat16"), w.astype("bfloat16"))
    assert set(half.values()) == {8}
    # Here, numbers of the CPU's digits.
    here, plain = (Remainders(0.5, z, d, 8, 0) for d in (digits, {"default": 24}))
    assert here.shared_unit == plain.shared_unit
    assert here.own_unit == plain.own_unit
    assert here.headroom == plain.headroom
    there = Remainders(0.5, z, {"default": tpu}, 8, 0)
    assert (there.shared_unit > plain.shared_unit) == (tpu < 24)


# --- shapes ---------------------------------------------------------------------------

SHAPES = [(), (1,), (5,), (0,), (3, 0), (3, 1), (2, 5, 7), (2, 4)]


@pytest.mark.parametrize("batch_ndim", [0, 1])
@pytest.mark.parametrize("bits", BITS)
def test_leaves_of_every_shape(bits, batch_ndim):
    rng = np.random.default_rng(2)
    shapes = [s for s in SHAPES if len(s) >= batch_ndim]
    a, b, f = (
        [jnp.asarray(rng.normal(size=s), "float32") for s in shapes] for _ in "abf"
    )

    @jax.jit
    def run(a, b, f):
        betas = [0.7 for _ in a]
        residues = Remainders(betas, a, {"default": MOST}, bits, batch_ndim)
        new = relax(a, f, betas)
        found = residues.record(a, b, f, new)
        out = residues.undo(b, f, new, betas, found, a, jnp.array(False))
        return found, *out

    found, states, repairs = run(a, b, f)
    trees = zip(a, states, repairs, found.codes, found.sizes, shapes, strict=True)
    for x, state, repair, code, size, shape in trees:
        assert state.shape == repair.shape == shape
        np.testing.assert_allclose(state, x, rtol=0, atol=2.0**-14)
        assert repair.size == 0 or float(jnp.max(repair)) <= 0.5
        # One unit for what shares the index of the first axis, or of the batch.
        lead = max(batch_ndim, min(1, len(shape) - 1))
        assert size.shape == shape[:lead] + (1,) * (len(shape) - lead)
        last = shape[-1] if shape else 1
        kept = -(-last // 2) if bits == 4 else last
        assert code.shape == shape[:-1] + ((kept,) if shape else ())


def test_codes_of_four_bits_share_bytes():
    for shape in SHAPES:
        code = np.random.default_rng(3).integers(0, 16, shape).astype(np.int32)
        packed = _remainders._pack(jnp.asarray(code), 4)
        assert packed.dtype == jnp.uint8
        np.testing.assert_array_equal(_remainders._unpack(packed, 4, shape), code)


# --- the arithmetic -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_remainders_are_those_of_pythons_integers(name, x64):
    rng = np.random.default_rng(4)
    # No state has more digits than a float.
    top = 2.0 ** rng.uniform(0, DIGITS[name], 400) * rng.choice([-1, 1], 400)
    near = np.arange(-400, 400) / 2 + 0.25
    x = np.concatenate([top, near, 12.0 * np.arange(-9, 9)]).astype(name)
    for modulus in (2, 12, 32, 192, 2**13, 3 * 2**14):
        got = jax.jit(ft.partial(_remainders._remainder, modulus=modulus))(x)
        np.testing.assert_array_equal(got, [int(np.rint(i)) % modulus for i in x])


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_exponents_and_powers(name, x64):
    info = np.finfo(name)
    exponents = np.arange(info.minexp, info.maxexp)
    powers = np.ldexp(np.ones((), name), exponents)
    got = jax.jit(_remainders._power, static_argnums=1)(
        exponents.astype("int32"), jnp.dtype(name)
    )
    np.testing.assert_array_equal(got, powers)
    factors = np.array([1, 1.25, 1.4999, 1.5, 1.75, 2 - 2 * info.eps], name)
    x = powers[:, None] * factors
    exponent, upper = jax.jit(_remainders._exponent)(x)
    np.testing.assert_array_equal(exponent, np.repeat(exponents[:, None], 6, 1))
    np.testing.assert_array_equal(upper, np.repeat(factors[None] >= 1.5, len(x), 0))
    least, _ = _remainders._exponent(jnp.zeros((), name))
    assert int(least) < info.minexp
