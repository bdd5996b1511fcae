"""AdamW with its schedules, two learning rates, and non-finite steps skipped."""

import dataclasses

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
import optax.contrib
from jaxtyping import PyTree

# `optax.apply_if_finite` lets a non-finite update through after so many in a row. None
# shall pass: `fit` stops the run instead.
_NEVER = 2**31 - 1

SHAPES = ("cosine", "constant", "plateau")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What an optimiser is made of.

    Attributes:
        learning_rate: the highest, reached at the end of the warm-up.
        steps: length of the whole run, at the end of which the rate is `final` times
            the highest.
        warmup: share of the steps with a growing rate.
        final: see `steps`.
        weight_decay: of AdamW; vectors (biases, norms) do not decay.
        beta2: decay of AdamW's second moments.
        clip: global norm to which gradients are clipped.
        cell_rate: factor on the learning rate of cells, i.e. parameters below an
            attribute called `cell`.
        shape: of the rate after the warm-up: `"cosine"`, `"constant"`, or `"plateau"`,
            which halves it when the training loss has not improved.
        patience: of `"plateau"`: after how many windows without improvement.
        window: of `"plateau"`: steps over which the training loss is averaged.
    """

    learning_rate: float
    steps: int
    warmup: float = 0.1
    final: float = 0.0
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0
    cell_rate: float = 1.0
    shape: str = "cosine"
    patience: int = 10
    window: int = 100

    def rate(self) -> optax.Schedule:
        """The learning rate as a function of the step, without the halving."""
        peak = self.learning_rate
        warmup = min(max(round(self.warmup * self.steps), 1), self.steps)
        total = max(self.steps, warmup + 1)
        if self.shape != "cosine":
            return optax.linear_schedule(0.0, peak, warmup)
        return optax.warmup_cosine_decay_schedule(
            0.0, peak, warmup, total, peak * self.final
        )


def make_optimiser(schedule: Schedule) -> optax.GradientTransformation:
    """Clipping and AdamW; a step whose gradient is not finite changes nothing."""
    if schedule.shape not in SHAPES:
        raise ValueError(f"`shape` must be one of {SHAPES}; got {schedule.shape!r}.")
    matrices = lambda params: jtu.tree_map(lambda p: jnp.ndim(p) > 1, params)
    chain = optax.chain(
        optax.clip_by_global_norm(schedule.clip),
        optax.adamw(
            schedule.rate(),
            b2=schedule.beta2,
            weight_decay=schedule.weight_decay,
            mask=matrices,
        ),
        # AdamW's decay is decoupled, so scaling the update is another learning rate.
        optax.masked(optax.scale(schedule.cell_rate), _in_cell),
        *_halving(schedule),
    )
    return optax.apply_if_finite(chain, max_consecutive_errors=_NEVER)


def _halving(schedule: Schedule) -> tuple[optax.GradientTransformation, ...]:
    if schedule.shape != "plateau":
        return ()
    reduce = optax.contrib.reduce_on_plateau(
        factor=0.5, patience=schedule.patience, accumulation_size=schedule.window
    )
    return (reduce,)


def _in_cell(params: PyTree) -> PyTree:
    cell = jtu.GetAttrKey("cell")
    return jtu.tree_map_with_path(lambda path, _: cell in path, params)


def skipped_steps(opt_state: PyTree) -> tuple[jax.Array, jax.Array]:
    """Steps skipped because of a non-finite gradient: in all, and in a row."""
    assert isinstance(opt_state, optax.ApplyIfFiniteState)
    return opt_state.total_notfinite, opt_state.notfinite_count
