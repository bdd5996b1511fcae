"""The table of models: what the documentation says is what the models are."""

import inspect
import json

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from benchmarks import _published, model_table
from benchmarks._published import ROWS
from deqjax import models, nn
from tests.nn.training import QUICK, quick

RECORDED = json.loads(model_table.MEMORY.read_text())["bytes"]

# Parameters of the whole and of the cell: published, or derived from the definitions.
PARAMETERS = {
    "RevDEQLM.wikitext103": (95_907_840, 18_296_832),
    "TransformerLM.wikitext103": (95_925_120, 0),
    "DEQTransformerLM.wikitext103": (97_691_888, 69_753_000),
    "DEQTransformerLM.wikitext103_regularised": (97_691_888, 69_753_000),
    "MDEQClassifier.cifar10_tiny": (158_890, 111_696),
    "MDEQClassifier.cifar10_large": (11_097_438, 8_715_232),
    "MDEQClassifier.imagenet_small": (16_808_936, 8_716_192),
    "MDEQClassifier.imagenet_large": (67_063_624, 54_422_800),
    # Stem and cell of the classifiers; two convolutions with bias, batch norm.
    "MDEQSegmenter.cityscapes_small": (
        8_727_488 + 480 * (481 + 2 + 19) + 19,
        8_716_192,
    ),
    "MDEQSegmenter.cityscapes_large": (
        54_489_440 + 1200 * (1201 + 2 + 19) + 19,
        54_422_800,
    ),
    "MDEQSegmenter.cityscapes_xl": (79_551_755, 77_699_952),
    "RevDEQClassifier.cifar10": (10_319_754, 7_674_368),
    # Stem and its norm, cell, and a head on 4 × 4 squares.
    "RevDEQClassifier.cifar10_single": (
        28 * 32 + 64 + (18 * 32**2 + 6 * 32) + 513 * 10,
        18 * 32**2 + 6 * 32,
    ),
    # 37 pairs of convolutions 35 → 35, five of them in the cell; the ends.
    "ImplicitResNet.cifar10": (
        37 * 2 * (35 * 35 * 9 + 35)
        + ((3 * 49 + 1) * 35 + (35 * 9 + 1) * 35 + 25 * 35 * 10),
        5 * 2 * (35 * 35 * 9 + 35),
    ),
    "MonotoneClassifier.mnist_dense": (84_313, 785 * 87 + 2 * 87**2),
    # Injection; A and B of each tier, P between tiers, each with a scale.
    "MonotoneClassifier.cifar10_conv": (172_218, 28 * 81 + 2 * (9 * 81**2 + 1)),
    "MonotoneClassifier.cifar10_tiers": (170_194, 110_184),
    "MonotoneClassifier.cifar10_conv_large": (853_612, 28 * 200 + 2 * (9 * 200**2 + 1)),
    "MonotoneClassifier.cifar10_tiers_large": (1_014_546, 886_536),
}

# Entries of the equilibria of one example: all scales, borders of monotone ones.
STATES = {
    "RevDEQLM.wikitext103": 448 * 768,
    "TransformerLM.wikitext103": 0,
    "DEQTransformerLM.wikitext103": 150 * 700,
    "MDEQClassifier.cifar10_tiny": 24 * (32**2 + 16**2),
    "MDEQClassifier.imagenet_small": 32 * 56**2 * (1 + 1 / 2 + 1 / 4 + 1 / 8),
    "MDEQSegmenter.cityscapes_xl": 88 * 192 * 256 * (1 + 1 / 2 + 1 / 4 + 1 / 8),
    "RevDEQClassifier.cifar10": 128 * 32**2 + 256 * 16**2 + 256 * 8**2 + 128 * 4**2,
    "ImplicitResNet.cifar10": 35 * 10**2,
    "MonotoneClassifier.cifar10_tiers": 16 * 34**2 + 32 * 18**2 + 60 * 10**2,
}


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


def configurations():
    """Those of all models of deqjax."""
    for name, kind in vars(models).items():
        if inspect.isclass(kind) and issubclass(kind, models.AbstractModel):
            yield from (
                f"{name}.{configuration}" for configuration in kind.configurations
            )


def test_every_configuration_has_a_row_and_every_row_a_record():
    names = [row.name for row in ROWS]
    assert sorted(names) == sorted(configurations())
    assert names == list(RECORDED) == list(PARAMETERS)


def test_models_have_their_parameters():
    assert {row.name: model_table.count(row) for row in ROWS} == PARAMETERS


def test_the_documentation_says_what_the_models_have():
    lines = model_table.PAGE.read_text().splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    number = lambda text: 0 if text == "–" else int(text.replace(",", ""))
    said = {row[0].strip("`"): row for row in rows}
    assert {n: (number(r[1]), number(r[2])) for n, r in said.items()} == PARAMETERS
    assert {n: number(said[n][4]) for n in STATES} == STATES


@pytest.mark.slow
def test_the_table_of_the_documentation_is_the_one_of_the_program():
    assert model_table.PAGE.read_text() == model_table.table(RECORDED)


# Above a minute on two cores: convolutions of up to 704 channels on up to 192 × 256
# pixels, and, of the monotone models, hundreds of matrices of up to 512 × 512 to invert
# (as real ones twice that). What they take is the compiler's account alone.
TOO_LARGE = (
    "MDEQClassifier.imagenet_large",
    "MDEQSegmenter.cityscapes_large",
    "MDEQSegmenter.cityscapes_xl",
    "MonotoneClassifier.cifar10_conv_large",
    "MonotoneClassifier.cifar10_tiers_large",
)


def rows(*without):
    return [pytest.param(r, id=r.name) for r in ROWS if r.name not in without]


@pytest.mark.slow
@pytest.mark.parametrize("row", rows())
def test_gradients_stay_within_the_memory_that_is_documented(row):
    if jax.default_backend() != "cpu":
        pytest.skip("the record is of a CPU")
    assert model_table.memory(row) <= 1.05 * RECORDED[row.name]


@pytest.mark.slow
@pytest.mark.parametrize("row", rows(*TOO_LARGE))
def test_published_sizes_take_a_step(row):
    """Initialised, and moved along the gradient, by which the loss changes as it says.

    Equilibria that need not be reached at random weights are two layers here, with an
    exact gradient; reversible models take their published steps, monotone ones solve.
    """
    exact = not row.name.startswith(("RevDEQ", "Monotone", "Transformer"))
    model, state = quick(_published.init)(row, QUICK)
    model = nn.unrolled(model, 2) if exact else model
    gradient, (moving, state) = _published.gradient(model, state)
    rng = np.random.default_rng(0)

    def generic(leaf):
        # Offsets of zero put whole scales on the kink of a ReLU.
        vector = leaf.size == max(leaf.shape, default=1)
        noise = 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype)
        return leaf + noise if vector else leaf

    moving = jax.tree.map(generic, moving)

    def draw(shape):
        if jnp.issubdtype(shape.dtype, jnp.integer):
            return jr.randint(jr.key(1), shape.shape, 0, 10)
        return jr.normal(jr.key(1), shape.shape, shape.dtype)

    data = jax.tree.map(draw, row.data)

    @quick
    def run(moving, by, direction):
        moved = jax.tree.map(lambda a, d: a + by * d, moving, direction)
        value, slope = gradient((moved, state), data, jr.key(2))
        return value, slope, sum(jnp.sum(s**2) for s in jax.tree.leaves(slope))

    value, slope, square = run(moving, 0.0, moving)
    # So far that the loss changes by a thousandth of itself.
    by = 1e-3 * value / square
    up, down = run(moving, by, slope)[0], run(moving, -by, slope)[0]
    np.testing.assert_allclose((up - down) / 2, 1e-3 * value, rtol=0.1)
