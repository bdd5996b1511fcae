"""The arithmetic of the reversible half step: what is lost is kept, bit for bit."""

import functools as ft
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deqjax
from deqjax.solvers import _arithmetic
from deqjax.solvers._arithmetic import ExactArithmetic, fraction
from deqjax.solvers._digits import pack, per_word, unpack

BETAS = [1 / 2, 3 / 4, 4 / 5, 7 / 8, 9 / 10, 7 / 10, 2 / 3, 1 / 8, 17 / 31]
LIMIT = {32: 2**30 - 1, 64: 2**62 - 1}


def exact(beta):
    r = fraction(beta)
    return ExactArithmetic(r.numerator, r.denominator, r.denominator)


def at_run_time(beta):
    r = fraction(beta)
    return ExactArithmetic(jnp.array(r.numerator), jnp.array(r.denominator), 32)


@ft.partial(jax.jit, static_argnums=0)
def there(calculus, a, f, unit):
    return calculus.advance(a, f, unit)


@ft.partial(jax.jit, static_argnums=0)
def back(calculus, b, f, unit, digits):
    return calculus.retreat(b, f, unit, digits)


def integers(rng, bits):
    """Of every size, negative ones and those next to the limit among them."""
    limit = LIMIT[bits] // 2
    near = limit - np.arange(40)
    small = np.arange(-70, 70)
    exponents = rng.uniform(0, np.log2(limit), 300)
    any_size = (2.0**exponents * rng.choice([-1, 1], 300)).astype(np.int64)
    out = np.concatenate([near, -near, small, np.clip(any_size, -limit, limit)])
    return out.astype(np.int64 if bits == 64 else np.int32)


def floats(rng, size, bits):
    """Values of f of up to 3/4 of the headroom in units, for a unit of 1."""
    return rng.uniform(-12, 12, size).astype(f"float{bits}")


# --- one half step --------------------------------------------------------------------


def check_half_step(calculus, beta, bits):
    rng = np.random.default_rng(0)
    a = integers(rng, bits)
    f = floats(rng, a.shape, bits)
    unit = jnp.ones((), f.dtype)
    if not isinstance(calculus.q, int):
        there_, back_ = calculus.advance, calculus.retreat
    else:
        there_, back_ = ft.partial(there, calculus), ft.partial(back, calculus)
    b, digits = there_(jnp.asarray(a), jnp.asarray(f), unit)
    assert b.dtype == a.dtype
    # In Python's integers, of any length.
    r, delta = fraction(beta), Fraction(2) ** (-26 if bits == 32 else -56)
    want_digits = [int(i) * r.numerator % r.denominator for i in a]
    got_digits = unpack(digits, calculus.base, a.shape)
    np.testing.assert_array_equal(got_digits, want_digits)
    kept = np.array([int(i) * r.numerator // r.denominator for i in a])
    added = np.asarray(b).astype(object) - kept
    assert np.max(np.abs(added)) > 0
    # A rounded β f / Δ: half a unit, and the rounding of the product in floats.
    for got, x in zip(added, f, strict=True):
        term = (1 - r) * Fraction(float(x)) / delta
        assert abs(got - term) <= Fraction(1, 2) + abs(term) * Fraction(2) ** (
            -22 if bits == 32 else -51
        )
    np.testing.assert_array_equal(back_(b, jnp.asarray(f), unit, digits), a)


@pytest.mark.parametrize("beta", BETAS)
def test_a_half_step_is_undone_bit_for_bit(beta):
    check_half_step(exact(beta), beta, 32)


@pytest.mark.parametrize("beta", [0.5, 0.7])
def test_a_half_step_of_float64_is_undone_bit_for_bit(beta, x64):
    check_half_step(exact(beta), beta, 64)


@pytest.mark.parametrize("beta", [0.75, 0.7])
def test_a_half_step_with_beta_of_run_time_is_undone_bit_for_bit(beta):
    check_half_step(at_run_time(beta), beta, 32)


def test_another_value_of_f_is_seen():
    calculus, f = exact(0.8), jnp.array([0.3, 0.7])
    unit = jnp.ones(())
    a = jnp.array([5, -7], jnp.int32)
    b, digits = there(calculus, a, f, unit)
    other = back(calculus, b, f + jnp.float32(2**-22), unit, digits)
    assert (np.asarray(other) != np.asarray(a)).all()


# --- the grid -------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-29, 1e-20, 1.0, 3.0, 1e20, 1e37])
def test_the_grid_resolves_26_bits_below_the_largest_entry(scale):
    z = jnp.array([1.0, -0.3, 0.0]) * jnp.float32(scale)
    f = jnp.array([0.2, 0.5, -0.9]) * jnp.float32(scale)
    calculus = exact(0.5)
    unit = calculus.unit(z, f, 0)
    assert 1 < float(unit) / float(jnp.max(jnp.abs(z))) <= 2
    assert float(jnp.frexp(unit)[0]) == 0.5
    again = calculus.decode(calculus.encode(f, unit), unit, f)
    assert float(jnp.max(jnp.abs(again - f))) <= float(unit) * 2**-27
    assert calculus.encode(z, unit)[2] == 0


def test_every_problem_has_its_own_grid():
    z = jnp.array([[1.0, 0.1], [1e-6, 1e-7], [0.0, 0.0]])
    calculus = exact(0.5)
    np.testing.assert_array_equal(calculus.unit(z, 3 * z, 1), [4.0, 2.0**-18, 2.0])


def test_the_grid_of_the_smallest_numbers_is_one_of_normal_numbers(x64):
    calculus = exact(0.5)
    for dtype in (jnp.float32, jnp.float64):
        z = jnp.array([1.5]).astype(dtype) * jnp.finfo(dtype).tiny * 2**40
        unit = calculus.unit(z, z, 0)
        again = calculus.decode(calculus.encode(z, unit), unit, z)
        assert abs(float(again[0] / z[0]) - 1) <= 1e-4
        zero = calculus.encode(z * 2.0**-40, unit)
        np.testing.assert_array_equal(zero, [0])


# --- marks ----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 64])
def test_marks_stay_and_never_wrap(bits, request):
    if bits == 64:
        request.getfixturevalue("x64")
    dtype, real = (f"{kind}{bits}" for kind in ("int", "float"))
    calculus, unit = exact(0.5), jnp.ones((), real)
    top = LIMIT[bits]
    least = int(np.iinfo(dtype).min)
    a = jnp.array([top, -top, top, -top, 0, 0, 0, 0, 5], dtype)
    inf, nan = np.inf, np.nan
    f = jnp.array([40.0, -200.0, 1e30, -1e30, inf, -inf, 300.0, nan, 0.25], real)
    over, not_a_number = least, least + 1
    b, _ = there(calculus, a, f, unit)
    # 40/2 units are within the headroom of 64 bits, but beyond that of 32.
    first = over if bits == 32 else top // 2 + 20 * 2**56
    ninth = 2 + 2 ** ((26 if bits == 32 else 56) - 3)
    want = [first, *[over] * 6, not_a_number, ninth]
    np.testing.assert_array_equal(b, want)
    np.testing.assert_array_equal(
        _arithmetic.overflowed({"b": b[None, :], "c": b[None, 8:]}, 1), [True]
    )
    np.testing.assert_array_equal(_arithmetic.overflowed(b[7:], 0), False)
    # What is marked stays so, whatever is added.
    for more in (0.0, 5.0, -5.0):
        b, _ = there(calculus, b, jnp.full_like(f, more), unit)
        np.testing.assert_array_equal(b[1:8], want[1:8])
    state = calculus.decode(b, unit, f)
    assert np.isnan(state[1:8]).all()
    assert np.isfinite(state[8])


def test_an_answer_with_a_mark_in_either_state_is_no_number():
    calculus, unit = exact(0.5), jnp.ones(3)
    like = jnp.ones((3, 2))
    fine = jnp.full((3, 2), 2**25, jnp.int32)
    bad = fine.at[1, 0].set(jnp.iinfo(jnp.int32).min + 1)
    for pair in ((fine, bad), (bad, fine)):
        z = calculus.answer(*pair, unit, like, 1)
        np.testing.assert_array_equal(z, [[0.5] * 2, [np.nan] * 2, [0.5] * 2])


def test_the_distance_of_neighbours_is_never_zero(x64):
    calculus = exact(0.5)
    for dtype, step in ((jnp.int32, 2.0**-26), (jnp.int64, 2.0**-56)):
        real = jnp.float64 if dtype == jnp.int64 else jnp.float32
        i = jnp.array([[LIMIT[8 * i_size(dtype)] - 1, 3]], dtype)
        unit = jnp.ones(1, real)
        apart = calculus.distance(i, i.at[0, 0].add(1), unit, 1)
        assert float(apart[0]) >= step
        np.testing.assert_array_equal(calculus.distance(i, i, unit, 1), [0.0])
        far = calculus.distance(i, i.at[0, 1].add(1024), unit, 1)
        np.testing.assert_array_equal(far, [1024 * step])


def i_size(dtype):
    return np.dtype(dtype).itemsize


# --- digits ---------------------------------------------------------------------------


@pytest.mark.parametrize("base", [2, 3, 5, 8, 10, 16, 31, 32])
def test_digits_are_packed_and_unpacked(base):
    shapes = [(), (1,), (70,), (0,), (3, 0), (0, 4), (3, 1), (2, 5, 7), (5, 33)]
    rng = np.random.default_rng(base)
    for shape in shapes:
        digits = rng.integers(0, base, shape).astype(np.uint32)
        if digits.size:
            digits.flat[-1] = base - 1
        words = pack(jnp.asarray(digits), base)
        assert words.dtype == jnp.uint32
        again = unpack(words, base, shape)
        assert again.shape == shape
        np.testing.assert_array_equal(again, digits)
        # No more words than the rows need.
        rows = shape[0] if len(shape) > 1 else 1
        size = digits.size // max(rows, 1)
        assert words.size == rows * -(-size // min(per_word(base), max(size, 1)))


def test_all_digits_at_their_largest_fill_a_word():
    for base in range(2, 33):
        count = per_word(base)
        assert base**count <= 2**32 < base ** (count + 1)
        words = pack(jnp.full(count, base - 1, jnp.uint32), base)
        assert int(words[0, 0]) == base**count - 1


@pytest.mark.parametrize(
    ("beta", "bits"),
    [(1 / 2, 1), (3 / 4, 2), (7 / 8, 3.2), (4 / 5, 2.5), (9 / 10, 3.6), (2 / 3, 1.6)],
)
def test_bits_per_digit(beta, bits):
    base = fraction(beta).denominator
    assert 32 / per_word(base) <= bits


# --- beta -----------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_the_fraction_of_beta(beta):
    r = fraction(beta)
    assert 0 < r < 1
    assert r.denominator <= 32
    assert abs(float(1 - r) - beta) <= 1e-9


@pytest.mark.parametrize("beta", [0.51, 0.01, 0.99])
def test_another_beta_is_refused_and_the_nearest_named(beta):
    with pytest.raises(ValueError, match="`beta`.*float") as info:
        deqjax.Reversible(beta=beta)
    fractions = {Fraction(p, q) for q in range(2, 33) for p in range(1, q)}
    below = [r for r in fractions if r < beta]
    above = [r for r in fractions if r > beta]
    named = [f"({r})" for r in [max(below, default=0), min(above, default=0)] if r]
    assert len(named) == (2 if beta == 0.51 else 1)
    message = str(info.value)
    assert all(name in message for name in named)
    assert message.count("(") == len(named)


def test_a_tuple_of_betas_is_checked():
    with pytest.raises(ValueError, match="at least one"):
        deqjax.Reversible(beta=())
    with pytest.raises(ValueError, match="nearest"):
        deqjax.Reversible(beta=(0.5, 0.123456))
