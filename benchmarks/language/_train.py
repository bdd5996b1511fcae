"""One run from its configuration to its results."""

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

import deqjax
from benchmarks.common import training

from ._config import TITLES, Config, output_paths
from ._data import Corpus, TrainBatches, load_corpus, valid_batches
from ._errors import UsageError
from ._models import make_model, token_nll


def loss_fn(
    model: Any, windows: Array, key: PRNGKeyArray
) -> tuple[Array, dict[str, Array]]:
    """The mean over tokens, and evaluations of the cell (or layers) per sequence."""
    nll, evals = token_nll(model, windows)
    return jnp.mean(nll), {"evaluations": jnp.mean(evals)}


class Validation:
    """Perplexity and bits per byte on fixed windows of the validation text."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        static: PyTree,
        placement: training.Placement,
    ):
        self._batches = valid_batches(
            corpus.valid, config.batch_size, config.length, config.eval_windows
        )
        self._placement = placement
        token_bytes = corpus.token_bytes

        def run(params: PyTree, windows: Array, weights: Array) -> dict[str, Array]:
            params = placement.gathered(params)
            model = eqx.combine(params, static)
            model = training.cast_linear(model, _dtype(config))
            nll, evals = token_nll(model, windows)
            sizes = jnp.asarray(token_bytes, jnp.float32)[windows[:, 1:]]
            return {
                "nats": jnp.sum(nll * weights[:, None]),
                "bytes": jnp.sum(sizes * weights[:, None]),
                "tokens": jnp.sum(weights) * nll.shape[1],
                "evaluations": jnp.sum(evals * weights),
                "rows": jnp.sum(weights),
            }

        self._run = jax.jit(run)

    def __call__(self, state: training.TrainState) -> dict[str, float]:
        """Of the moving average of the parameters, if there is one."""
        params = state.params if state.ema is None else state.ema
        parts = [self._run(params, *map(self._put, batch)) for batch in self._batches]
        rows = jax.device_get(parts)
        total = {name: math.fsum(float(r[name]) for r in rows) for name in rows[0]}
        loss = total["nats"] / total["tokens"]
        return {
            "valid_loss": loss,
            "bits_per_byte": total["nats"] / total["bytes"] / math.log(2),
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "evaluations": total["evaluations"] / total["rows"],
        }

    def _put(self, x: np.ndarray) -> Array:
        return self._placement.put_batch(x)


def _dtype(config: Config) -> str:
    return {"float32": "float32", "bf16": "bfloat16"}[config.precision]


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
        config.data, Path(config.data_dir) if config.data_dir else None, config.length
    )
    try:
        model = make_model(config, corpus.vocab_size)
    except ValueError as error:
        raise UsageError(" ".join(str(error).split())) from error
    parameters = deqjax.nn.count_parameters(model)
    optimiser = training.make_optimiser(
        training.Schedule(
            learning_rate=config.lr,
            steps=config.steps,
            warmup=config.warmup,
            weight_decay=config.weight_decay,
            cell_rate=config.cell_rate,
        )
    )
    state, static = training.init_state(
        model, optimiser, key=jr.key(config.seed), ema=config.ema is not None
    )
    state = placement.put_state(state)
    _prepare(output, config, corpus, resume)
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
        with training.MetricsLog(paths["metrics"], resume_at=at) as log:
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
                display=training.ProgressDisplay(progress, _describe),
                placement=placement,
                title=TITLES[config.model],
            )
    return result, _report(config, corpus, parameters, result, paths)


def _describe(metrics: Any) -> str:
    if "bits_per_byte" in metrics:
        text = f"valid {metrics['bits_per_byte']:.4f} bits/byte"
        return f"{text}, perplexity {metrics['perplexity']:.3f}"
    return f"loss {metrics['loss']:.4f}, gradient {metrics['grad_norm']:.2g}"


# Output


def check_output(output: Path, config: Config, resume: bool) -> bool:
    """Refuse a directory that the run cannot use; return whether to resume one.

    Raises:
        UsageError: naming `--output` or `--resume`.
    """
    paths = output_paths(output)
    above = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UsageError(
            f"--output: {output} cannot be written ({above} is no writable directory); "
            "choose another"
        )
    if not paths["config"].exists():
        if output.exists() and any(output.iterdir()):
            raise UsageError(
                f"--output: {output} holds other things than a run, which are never "
                "overwritten; choose another directory"
            )
        return False
    if not resume:
        raise UsageError(
            f"--output: {output} holds an earlier run; add --resume to continue it, or "
            "choose another directory"
        )
    try:
        found = json.loads(paths["config"].read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--resume: cannot read {paths['config']}: {error}") from error
    wanted = config.to_json()
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    if changed:
        name = changed[0]
        raise UsageError(
            f"--resume: {output} was trained with {name} = {found.get(name)!r}, but "
            f"this run has {wanted[name]!r}; give the options of the first run, or "
            "choose another --output"
        )
    return True


def _prepare(output: Path, config: Config, corpus: Corpus, resume: bool) -> None:
    paths = output_paths(output)
    if resume:
        earlier = json.loads(paths["config"].read_text(encoding="utf-8"))["tokens"]
        if earlier != _sizes(corpus):
            raise UsageError(
                f"--resume: the text has changed since the run began ({_sizes(corpus)} "
                f"now, {earlier} then); restore it, or start anew in another --output"
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    if corpus.vocabulary is not None:
        text = json.dumps(corpus.vocabulary, ensure_ascii=False)
        training.write_atomically(paths["vocabulary"], text)
    _write_json(paths["config"], {"config": config.to_json(), "tokens": _sizes(corpus)})


def _sizes(corpus: Corpus) -> dict[str, int]:
    return {
        "train": len(corpus.train),
        "valid": len(corpus.valid),
        "vocabulary": corpus.vocab_size,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False)
    training.write_atomically(path, text + "\n")


def _report(
    config: Config,
    corpus: Corpus,
    parameters: int,
    result: training.FitResult,
    paths: dict[str, Path],
) -> dict[str, Any]:
    """Write results and figure of a run that is complete."""
    seconds = max(result.seconds, 1e-9)
    # The first step compiles; it is not in the seconds.
    rate = max(result.steps - 1, 0) * config.batch_size * config.length / seconds
    report = {
        **result.metrics,
        "parameters": parameters,
        "steps": int(result.state.step),
        "seconds": result.seconds,
        "tokens_per_second": rate,
        "tokens": _sizes(corpus),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count() if config.mesh else 1,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "config": config.to_json(),
    }
    if result.stopped_by is not None:
        return report
    rows = training.read_metrics(paths["metrics"])
    steps = [r for r in rows if r["kind"] == "train"]
    tests = [r for r in rows if r["kind"] == "valid"]
    if not result.metrics and tests:  # resumed after its end
        report |= {k: v for k, v in tests[-1].items() if k not in ("kind", "step")}
    nan = lambda x: math.nan if x is None else x
    per_byte = float(np.mean(corpus.token_bytes[corpus.valid])) * math.log(2)
    curves = [
        training.Curve(
            "training (smoothed)",
            [r["step"] for r in steps],
            [nan(r["loss"]) / per_byte for r in steps],
            faint=True,
        ),
        training.Curve(
            "validation",
            [r["step"] for r in tests],
            [nan(r["bits_per_byte"]) for r in tests],
        ),
    ]
    norms = training.Curve(
        "norm, smoothed",
        [r["step"] for r in steps],
        [nan(r["grad_norm"]) for r in steps],
        faint=True,
    )
    title = (
        f"{TITLES[config.model]} on {corpus.name}: {report['bits_per_byte']:.3f} bits "
        f"per byte ({parameters:,} parameters)"
    )
    panels = {"Bits per byte": curves, "Gradient": [norms]}
    training.draw_curves(panels, title, paths["figure"])
    _write_json(paths["results"], report)
    return report
