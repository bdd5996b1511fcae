"""Settings of all tests. Annotations are checked by the option in pyproject.toml."""

import gc
import pathlib

import jax
import pytest

# deqjax must not lean on implicit promotion, which users may have switched off; and
# two devices are enough to see whether a batch stays sharded.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 2)


@pytest.fixture(autouse=True)
def few_maps():
    """Forget compiled programs before there are too many for one process.

    Each takes several memory maps, of which Linux allows a process 65,530; then
    compiling ends in a segmentation fault.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Float64 for the length of a test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(params=["float32", "float64", "bfloat16", "float16"])
def dtype(request):
    """Every floating-point type that a state may have, x64 switched on where needed."""
    wide = request.param == "float64"
    if wide:
        jax.config.update("jax_enable_x64", True)
    yield jax.numpy.dtype(request.param)
    if wide:
        jax.config.update("jax_enable_x64", False)
