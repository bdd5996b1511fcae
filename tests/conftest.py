"""Settings of all tests. Annotations are checked by the option in pyproject.toml."""

import gc
import pathlib

import jax
import pytest
from jax._src import compiler

# deqjax must not lean on implicit promotion, which users may have switched off; and
# two devices are enough to see whether a batch stays sharded.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 2)


# Compiling is most of the time of the tests, and XLA needs a quarter of it if it does
# not try hard. `XLA_FLAGS` would say so for a whole process; here it is said program by
# program. Marked as `optimised`, and slow, are the tests for which it matters: of
# exactness, of cost, of memory. They see what users get.
_LITTLE_EFFORT = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def _is_known(option, value):
    """Whether this version of XLA has the option: they come and go."""
    program = jax.jit(lambda: 0.0, compiler_options={option: value})
    try:
        program.lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


_known = {k: v for k, v in _LITTLE_EFFORT.items() if _is_known(k, v)}
_effort = {"little": True}
_get_compile_options = compiler.get_compile_options


def _with_effort(*args, env_options_overrides=None, **kwargs):
    given = env_options_overrides or {}
    if _effort["little"]:
        given = _known | given
    return _get_compile_options(*args, env_options_overrides=given, **kwargs)


compiler.get_compile_options = _with_effort


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    little = not any(item.get_closest_marker(m) for m in ("optimised", "slow"))
    if little != _effort["little"]:
        _effort["little"] = little
        jax.clear_caches()


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
