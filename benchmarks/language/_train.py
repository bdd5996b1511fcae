"""One run from its configuration to its results."""

import math
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

import deqjax
from benchmarks.common import training

from ._config import TITLES, Config, output_paths
from ._data import Corpus, TrainBatches, ValidWindows, load_corpus
from ._errors import UsageError
from ._models import make_model, token_nll
from ._output import check_output, prepare_output, read_config, write_report


def loss_fn(
    model: Any, windows: Array, key: PRNGKeyArray
) -> tuple[Array, dict[str, Array]]:
    """The mean over tokens, and evaluations of the cell (or layers) per sequence.

    The key is that of the step, a function of the run's seed and the step's number, so
    that a resumed run draws the masks of an uninterrupted one.
    """
    nll, evals = token_nll(model, windows, key)
    return jnp.mean(nll), {"evaluations": jnp.mean(evals)}


class Validation:
    """Perplexities and bits per byte on fixed windows of the text, without dropout."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        static: PyTree,
        placement: training.Placement,
    ):
        self._windows = ValidWindows(
            corpus.valid, config.batch_size, config.length, config.eval_windows
        )
        self._placement = placement

        def run(params: PyTree, windows: Array, weights: Array) -> dict[str, Array]:
            params = placement.gathered(params)
            model = eqx.nn.inference_mode(eqx.combine(params, static))
            model = training.cast_linear(model, _dtype(config))
            nll, evals = token_nll(model, windows)
            return {
                "nats": jnp.sum(nll * weights[:, None]),
                "tokens": jnp.sum(weights) * nll.shape[1],
                "evaluations": jnp.sum(evals * weights),
                "rows": jnp.sum(weights),
            }

        self._run = jax.jit(run)

    def __call__(self, state: training.TrainState) -> dict[str, float]:
        """Of the moving average of the parameters, if there is one."""
        params = training.best_params(state)
        batches = map(self._placement.put_batch, self._windows.batches)
        parts = [self._run(params, *batch) for batch in batches]
        rows = jax.device_get(parts)
        total = {name: math.fsum(float(r[name]) for r in rows) for name in rows[0]}
        loss = total["nats"] / total["tokens"]
        return {
            "valid_loss": loss,
            "bits_per_byte": total["nats"] / self._windows.size / math.log(2),
            "perplexity": _exp(loss),
            "word_perplexity": _exp(total["nats"] / max(self._windows.words, 1)),
            "evaluations": total["evaluations"] / total["rows"],
        }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _dtype(config: Config) -> str:
    return {"float32": "float32", "bf16": "bfloat16"}[config.precision]


def _make_optimiser(config: Config) -> optax.GradientTransformation:
    return training.make_optimiser(
        training.Schedule(
            learning_rate=config.lr,
            steps=config.steps,
            warmup=config.warmup,
            weight_decay=config.weight_decay,
            cell_rate=config.cell_rate,
            shape=config.schedule,
            patience=config.patience,
        )
    )


def _init_state(
    config: Config, model: eqx.Module, optimiser: optax.GradientTransformation
) -> tuple[training.TrainState, PyTree]:
    key, average = jr.key(config.seed), config.ema is not None
    return training.init_state(model, optimiser, key=key, ema=average)


def load_run(directory: Path | str) -> tuple[Any, Config]:
    """The model of a run after its latest checkpoint, and the run's configuration.

    The model is in inference mode: without dropout, if the run had any.

    Args:
        directory: that the run was given as `--output`.

    Raises:
        UsageError: if it is not the directory of a run.
        CheckpointError: if no checkpoint can be read.
    """
    paths = output_paths(Path(directory))
    config, sizes = read_config(paths["config"])
    model = make_model(config, sizes["vocabulary"])
    state, static = _init_state(config, model, _make_optimiser(config))
    placement = training.Placement(training.make_mesh(None))
    with training.Checkpoints(paths["checkpoints"], keep=config.keep) as checkpoints:
        found = checkpoints.restore(placement.put_state(state))
    if found is None:
        raise UsageError(f"{directory} holds no checkpoint; train until it does")
    model = eqx.combine(training.best_params(found), static)
    return eqx.nn.inference_mode(model), config


def train(
    config: Config, output: Path, *, resume: bool, progress: str
) -> tuple[training.FitResult, dict[str, Any]]:
    """Train and write everything below `output`.

    Raises:
        UsageError: for choices or data that cannot be used; nothing is changed then.
        TrainingError, CheckpointError, OSError: if the run cannot go on.
    """
    paths = output_paths(output)
    resume = check_output(output, config, resume)
    try:
        placement = training.Placement(training.make_mesh(config.mesh))
        placement.check_batch(config.batch_size, config.accumulate)
    except training.MeshError as error:
        raise UsageError(f"--mesh: {error}") from error
    corpus = load_corpus(
        config.data,
        Path(config.data_dir) if config.data_dir else None,
        config.length,
        tokens=config.tokens,
        least=config.min_count,
    )
    try:
        model = make_model(config, corpus.vocab_size)
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error
    parameters = deqjax.nn.count_parameters(model)
    optimiser = _make_optimiser(config)
    state, static = _init_state(config, model, optimiser)
    state = placement.put_state(state)
    if training.is_main():
        prepare_output(output, config, corpus, resume)
    training.agree(False)  # the directory is there for all processes
    with training.Checkpoints(paths["checkpoints"], keep=config.keep) as checkpoints:
        saved = checkpoints.restore(state) if resume else None
        state = state if saved is None else saved
        step = training.make_step(
            loss_fn,
            static,
            optimiser,
            accumulate=config.accumulate,
            ema_decay=config.ema,
            dtype=_dtype(config),
            placement=placement,
        )
        at = int(state.step) if resume else None
        with training.MetricsLog(
            paths["metrics"],
            resume_at=at,
            events=paths["events"] if config.tensorboard else None,
            is_writer=training.is_main(),
        ) as log:
            validation = Validation(config, corpus, static, placement)
            result = training.fit(
                state,
                step,
                TrainBatches(
                    corpus.train, config.batch_size, config.length, config.seed
                ),
                steps=config.steps,
                log=log,
                evaluate=validation,
                eval_every=config.eval_every,
                checkpoints=checkpoints,
                save_every=config.save_every,
                display=training.ProgressDisplay(
                    progress if training.is_main() else "off", _describe
                ),
                placement=placement,
                title=TITLES[config.model],
            )
    return result, write_report(config, corpus, parameters, result, paths)


def _describe(metrics: Any) -> str:
    if "bits_per_byte" in metrics:
        text = f"valid {metrics['bits_per_byte']:.4f} bits/byte"
        return f"{text}, perplexity {metrics['perplexity']:.3f}"
    return f"loss {metrics['loss']:.4f}, gradient {metrics['grad_norm']:.2g}"
