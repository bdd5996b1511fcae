"""The table of models: what the documentation says is what the models are."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from benchmarks import model_table
from benchmarks.model_table import ROWS

RECORDED = json.loads(model_table.MEMORY.read_text())["bytes"]


def test_the_table_of_the_documentation_is_the_one_of_the_models():
    with jax.numpy_dtype_promotion("standard"):
        assert model_table.PAGE.read_text() == model_table.table(RECORDED)


def test_every_named_configuration_has_a_row_and_every_row_a_record():
    assert [row.name for row in ROWS] == list(RECORDED)
    for row in ROWS:
        assert row.make.__qualname__ == row.name


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_gradients_stay_within_the_memory_that_is_documented(row):
    if jax.default_backend() != "cpu":
        pytest.skip("the record is of a CPU")
    with jax.numpy_dtype_promotion("standard"):
        assert model_table.memory(row) <= 1.05 * RECORDED[row.name]


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_published_sizes_take_a_step(row):
    """Initialised, and moved against the gradient, which lowers the loss."""
    short = {"max_steps": 4} if "DEQ" in row.name else {}
    model = row.make(key=jr.key(0), **short)
    data = jax.tree.map(
        lambda s: (
            jr.randint(jr.key(1), s.shape, 0, 1000)
            if jnp.issubdtype(s.dtype, jnp.integer)
            else jr.normal(jr.key(1), s.shape, s.dtype)
        ),
        row.data,
    )

    @eqx.filter_jit
    def run(model):
        value, gradient = eqx.filter_value_and_grad(row.loss)(model, data, jr.key(2))
        size = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
        return value, eqx.apply_updates(
            model, jax.tree.map(lambda g: -0.1 / size * g, gradient)
        )

    before, model = run(model)
    after, _ = run(model)
    assert np.isfinite(float(before))
    assert float(after) < float(before)
