"""Meshes of devices: where parameters, optimiser state and batches are kept."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree

AXES = ("data", "fsdp")


class MeshError(ValueError):
    """A mesh that cannot be had; the message says why."""


def make_mesh(text: str | None) -> Mesh:
    """The mesh that `"data=4,fsdp=2"` describes; None: one device.

    Axes that are not named have size 1, and a size of -1 takes all devices that are
    left.

    Raises:
        MeshError: if the text is not of this form, or the devices do not suffice.
    """
    count = jax.device_count()
    sizes = dict.fromkeys(AXES, 1)
    for part in (text or "").split(",") if text else ():
        name, _, size = part.strip().partition("=")
        if name not in AXES or not size.lstrip("-").isdigit():
            raise MeshError(
                f"got {text!r}, but a mesh is written as `data=4,fsdp=2`, with one or "
                f"both of the axes {' and '.join(AXES)}"
            )
        sizes[name] = int(size)
    for name, size in sizes.items():
        if size == -1:
            others = math.prod(s for n, s in sizes.items() if n != name)
            sizes[name] = count // others if others > 0 else 0
    if any(size < 1 for size in sizes.values()):
        raise MeshError(f"got {text!r}, but each axis needs at least 1 device")
    wanted = math.prod(sizes.values())
    if wanted > count:
        raise MeshError(
            f"got {text!r}, which takes {wanted} devices, but there are only {count}; "
            "choose a smaller mesh (or, to try one on the CPU, set XLA_FLAGS="
            f"--xla_force_host_platform_device_count={wanted})"
        )
    if jax.process_count() > 1 and wanted < count:
        raise MeshError(
            f"got {text!r}, which takes {wanted} devices, but all {count} devices of "
            f"{jax.process_count()} processes have to take part"
        )
    devices = np.array(jax.devices()[:wanted]).reshape([sizes[a] for a in AXES])
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


class Placement:
    """Where arrays are kept on a mesh.

    Batches are split over both axes. Parameters, optimiser state and averages are split
    over `fsdp`, along their longest axis that its size divides. A step gathers the
    parameters once, before the solve (`gathered`), so that no loop of a solver holds a
    collective on weights.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self.batch = NamedSharding(mesh, PartitionSpec(AXES))

    @property
    def is_single(self) -> bool:
        """Whether there is only one device."""
        return self.mesh.size == 1

    def of_state(self, tree: PyTree) -> PyTree:
        """The sharding of each array of a state."""
        size = self.mesh.shape["fsdp"]

        def spec(leaf: Any) -> NamedSharding:
            shape = leaf.shape
            able = [i for i, n in enumerate(shape) if size > 1 and n % size == 0]
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or not able:
                return self.replicated
            longest = max(able, key=lambda i: shape[i])
            axes = ["fsdp" if i == longest else None for i in range(len(shape))]
            return NamedSharding(self.mesh, PartitionSpec(*axes))

        return jtu.tree_map(spec, tree)

    def put_state(self, tree: PyTree) -> PyTree:
        """The state, spread over the mesh."""
        if jax.process_count() == 1:
            return jax.device_put(tree, self.of_state(tree))
        return jtu.tree_map(_from_each_process, tree, self.of_state(tree))

    def put_batch(self, batch: PyTree) -> PyTree:
        """A batch of NumPy arrays, the first axis spread over the mesh.

        Each process holds the whole batch and uploads the rows of its own devices.
        """
        return jtu.tree_map(lambda x: _from_each_process(x, self.batch), batch)

    def check_batch(self, rows: int, accumulate: int = 1) -> None:
        """Refuse a batch whose parts the devices do not divide.

        Raises:
            MeshError: naming a size that fits.
        """
        unit = self.mesh.size * accumulate
        if rows % unit:
            raise MeshError(
                f"a batch of {rows} does not divide by {unit}, the devices times the "
                f"parts of --accumulate; choose {max(rows // unit, 1) * unit}"
            )

    def mean_over_batch(self, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
        """`fn(params, batch, key)`, which is a mean over the batch, on all devices.

        Each device evaluates it on its own rows, with a key of its own, and the results
        are averaged once. Left to the compiler, every step of a backward solve would
        add up the gradient of the weights over the devices.
        """
        if self.is_single:
            return fn

        def local(params: PyTree, batch: PyTree, key: PRNGKeyArray) -> PyTree:
            key = jax.random.fold_in(key, jax.lax.axis_index(AXES))
            return jax.lax.pmean(fn(params, batch, key), AXES)

        whole, rows = PartitionSpec(), PartitionSpec(AXES)
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(whole, rows, whole),
            out_specs=whole,
            check_vma=False,
        )

    def gathered(self, params: PyTree) -> PyTree:
        """The parameters on every device, gathered once."""
        if self.mesh.shape["fsdp"] == 1:
            return params
        return jax.lax.with_sharding_constraint(params, self.replicated)


def _from_each_process(x: Any, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds as a whole, as one over all their devices."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _from_each_process(jax.random.key_data(x), sharding)
        wrap = lambda d: jax.random.wrap_key_data(d, impl=jax.random.key_impl(x))
        return jax.jit(wrap, out_shardings=sharding)(data)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
