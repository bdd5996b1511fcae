"""Time training steps of the language model, and their share of the matrix rate."""

import functools as ft
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
import optax

import deqjax
from deqjax.models import RevDEQLM

from .. import (
    _reversal_measures as reversal,
    _solver_measures as measures,
)
from ..reversal import relative_error
from ._cells import structs
from ._language_model import Step, loss_of, operations, parts, train_step
from ._programs import at_once, compile_all, in_turns, summary
from ._session import OutOfTime, Section, Session

SMALL = {"vocab_size": 512, "dim": 64, "num_heads": 4, "hidden": 256, "max_length": 64}
BATCH, SMALL_BATCH = 32, 4
MATRIX, SMALL_MATRIX = 8192, 512
PRODUCTS = 10


STEPS = (
    Step("bfloat16", "reversible", 4),
    Step("float32", "reversible", 4),
    Step("bfloat16", "unrolled", 4),
    Step("bfloat16", "reversible", 16),
    Step("float32", "unrolled", 4),
)


# The rate of matrix products


def products(dtype: str, size: int) -> tuple[Callable, tuple]:
    """A chain of products of random matrices, so that none can be left out."""

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        scale = jnp.asarray(size**-0.5, x.dtype)
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, x: (x @ w) * scale, x)

    draw = jax.jit(lambda key: jr.normal(key, (size, size), dtype))
    return run, (draw(jr.key(0)), draw(jr.key(1)))


def matrix_rates(session: Session, section: Section) -> dict[str, float]:
    """Operations per second of a large product in each dtype, at default precision."""
    size = SMALL_MATRIX if session.small else MATRIX
    rates = {}
    for dtype in ("bfloat16", "float32"):
        name = f"matrix product {size}³, {dtype}"
        try:
            run, given = products(dtype, size)
            program, _ = measures.compiled(jax.jit(run), *given)
            samples = in_turns({name: ft.partial(program, *given)}, 1.5, 3, 20)[name]
            rate = 2 * size**3 * PRODUCTS / samples
            rates[dtype] = float(np.median(rate))
            row = {"case": name, "ms": summary(samples / PRODUCTS)}
            section.add(row | {"Tflop/s": summary(rate, 1e-12)})
            section.say(f"{name}: {rates[dtype] / 1e12:.4g} Tflop/s")
        except Exception as error:
            section.give_up(name, error)
    return rates


# Measurements


class Setting(NamedTuple):
    """A model and what it is trained with."""

    params: Any
    static: Any
    optimiser: Any
    batch: int

    @property
    def model(self) -> RevDEQLM:
        """The whole."""
        return eqx.combine(self.params, self.static)

    @property
    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """A batch of random text, and what follows each of its tokens."""
        vocabulary, length = self.model.tokens.weight.shape[0], self.model.max_length
        rng = np.random.default_rng(0)
        text = rng.integers(vocabulary, size=(self.batch, length + 1), dtype=np.int32)
        return text[:, :-1], text[:, 1:]

    @property
    def case(self) -> str:
        """The size of a batch in words."""
        return f"batch of {self.batch} × {self.model.max_length}"


def run(session: Session, section: Section) -> None:
    """Rates, then the steps, then gradients against float64.

    The batch is halved as long as the device's memory does not suffice.
    """
    rates = matrix_rates(session, section)
    model = eqx.filter_jit(RevDEQLM.published)(
        "wikitext103", key=jr.key(0), **(SMALL if session.small else {})
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    batch = SMALL_BATCH if session.small else BATCH
    setting = Setting(params, static, optax.adamw(3e-4), batch)
    steps = [s for s in STEPS if session.wants(s.name)]
    steps = steps[:2] if session.quick else steps
    while steps and setting.batch >= 1:
        steps = _steps(session, section, setting, steps, rates)
        setting = setting._replace(batch=setting.batch // 2)
    _gradients(session, section, setting._replace(batch=1))


def _steps(
    session: Session,
    section: Section,
    setting: Setting,
    steps: list[Step],
    rates: dict[str, float],
) -> list[Step]:
    """Measure, and return those for which there was no memory."""
    jobs: dict[str, Callable[[], Any]] = {
        step.name: ft.partial(_compiled, setting, step) for step in steps
    }
    whole = [step for step in STEPS[:2] if step in steps and not session.quick]
    pieces = {
        f"{step.name}: {name}": job
        for step in whole
        for name, job in parts(setting.model, step, setting.batch, setting.optimiser)
    }
    pieces = {
        name: (ft.partial(measures.compiled, jax.jit(fn), *shapes), shapes)
        for name, (fn, shapes) in pieces.items()
    }
    jobs |= {name: job for name, (job, _) in pieces.items()}
    compiled: dict[str, Any] = dict(
        at_once(jobs, session.workers, 0.6 * section.left())
    )
    again = []
    for i, step in enumerate(steps):
        label = f"{step.name}, {setting.case}"
        try:
            if isinstance(compiled[step.name], BaseException):
                raise compiled[step.name]
            if section.left() < 3:
                raise OutOfTime("no time was left for it")
            seconds = 0.4 * section.left() / (len(steps) - i)
            row = _time(section, setting, step, compiled[step.name], rates, seconds)
        except Exception as error:
            section.give_up(label, error)
            if "RESOURCE_EXHAUSTED" in str(error):
                again.append(step)
            continue
        if step in whole:
            own = {n: shapes for n, (_, shapes) in pieces.items() if step.name in n}
            _time_parts(section, row, own, compiled, seconds)
        section.add(row)
    return again


def _compiled(setting: Setting, step: Step) -> tuple[Any, float]:
    fn = train_step(setting.static, step, setting.optimiser)
    params = structs(setting.params)
    state = jax.eval_shape(setting.optimiser.init, params)
    given = params, state, deqjax.BackwardStats(), *setting.tokens
    # New parameters and state take the memory of the old ones.
    return measures.compiled(jax.jit(fn, donate_argnums=(0, 1)), *given)


def _time(
    section: Section,
    setting: Setting,
    step: Step,
    compiled: tuple[Any, float],
    rates: dict[str, float],
    seconds: float,
) -> dict[str, Any]:
    program, compiling = compiled
    held = [jtu.tree_map(jnp.copy, setting.params)]
    held.append(jax.jit(setting.optimiser.init)(held[0]))
    fixed = deqjax.BackwardStats(), *jax.device_put(setting.tokens)

    def once() -> Any:
        *held[:], value, stats = program(*held, *fixed)
        return value, stats

    first, stats = jax.device_get(once())
    samples = in_turns({"step": once}, seconds, least=3, most=40)["step"]
    last, _ = jax.device_get(once())
    middle = float(np.median(samples))
    useful, executed = operations(setting.model, setting.batch, step.depth)
    row: dict[str, Any] = {
        "case": f"{step.name}, {setting.case}",
        "parameters": deqjax.nn.count_parameters(setting.model),
        "ms": summary(samples),
        "tokens per second": setting.tokens[0].size / middle,
        "compile, s": compiling,
        "temp bytes": measures.temp_bytes(program),
        "first loss": float(first),
        "last loss": float(last),
    }
    counts = {"model operations": useful}
    if step.adjoint == "reversible":
        counts["executed operations"] = executed
        row |= reversal.record(stats) | {"error": 0.0, "allowed": 0.0}
        row["failure"] = reversal.judge(row)
        del row["error"], row["allowed"]  # Gradients are compared elsewhere.
    for name, count in counts.items():
        row[name] = count
        row[f"{name}, Tflop/s"] = count / middle / 1e12
        if step.dtype in rates:
            row[f"{name}, share"] = count / middle / rates[step.dtype]
    shares = [f"{row[key]:.3f}" for key in row if key.endswith("share")]
    section.say(
        f"{row['case']}: {row['ms']['median']:.4g} ms, share of the matrix rate "
        f"{' or '.join(shares)}"
    )
    return row


def _time_parts(
    section: Section,
    row: dict[str, Any],
    shapes: dict[str, Any],
    compiled: dict[str, Any],
    seconds: float,
) -> None:
    """Add the milliseconds of each part alone to a row; inputs are zeros."""
    fill = lambda tree: jtu.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), tree)
    times = {}
    try:
        for name, given in shapes.items():
            if isinstance(compiled[name], BaseException):
                raise compiled[name]
            run = ft.partial(compiled[name][0], *fill(given))
            samples = in_turns({name: run}, seconds / len(shapes), 3, 20)[name]
            times[name.split(": ")[-1]] = float(np.median(samples)) * 1e3
    except Exception as error:
        section.give_up(f"{row['case']}: parts", error)
        return
    row["parts, ms"] = times
    row["ratio to its parts"] = row["ms"]["median"] / sum(times.values())
    text = ", ".join(f"{name} {ms:.3g}" for name, ms in times.items())
    section.say(f"{row['case']}: {row['ratio to its parts']:.3f} × its parts: {text}")


def _gradients(session: Session, section: Section, setting: Setting) -> None:
    """Gradients of the whole model against float64 backpropagation."""
    names = [f"gradient, {dtype}" for dtype in ("bfloat16", "float32")]
    names = [name for name in names if session.wants(name)]
    if session.platform == "tpu" or session.quick or not names:
        return

    def job(step: Step) -> Any:
        loss = loss_of(setting.static, step)
        both = jax.jit(jax.grad(loss, argnums=(0, 1)))
        with jax.enable_x64(step.dtype == "float64"):
            probe = deqjax.BackwardStats()
            given = structs(setting.params), probe, *setting.tokens
            return both.lower(*given).compile()

    def call(step: Step) -> Any:
        with jax.enable_x64(step.dtype == "float64"):
            given = setting.params, deqjax.BackwardStats(), *setting.tokens
            return jax.device_get(compiled[step.name](*given))

    reference = Step("float64", "unrolled", 4)
    pairs = {
        f"gradient, {dtype}": [Step(dtype, a, 4) for a in ("reversible", "unrolled")]
        for dtype in ("bfloat16", "float32")
    }
    steps = [reference, *(step for name in names for step in pairs[name])]
    jobs = {step.name: ft.partial(job, step) for step in steps}
    compiled = compile_all(jobs, session.workers, section)
    if reference.name not in compiled:
        return
    exact, _ = call(reference)
    for name in names:
        ours, textbook = pairs[name]
        if not {ours.name, textbook.name} <= set(compiled):
            continue
        (grads, stats), (other, _) = call(ours), call(textbook)
        limit = relative_error(other, exact)
        row: dict[str, Any] = {"case": f"{name}, {setting.case}"}
        row |= reversal.record(stats) | {"error": relative_error(grads, exact)}
        row |= {"backpropagation": limit, "allowed": max(2 * limit, reversal.ROUNDING)}
        row["failure"] = reversal.judge(row)
        section.add(row)
        section.say(
            f"{row['case']}: {'FAIL ' + row['failure'] if row['failure'] else 'PASS'}, "
            f"error {row['error']:.1e} (backpropagation {limit:.1e})"
        )
