"""Devices and hosts: one mesh from one description, and rules of what lives where on it.

    mesh = devices.mesh("data=4,fsdp=2")        # or a flag: --mesh data=4,fsdp=2

A mesh has up to three axes. A batch is divided over "data" and "fsdp"; large arrays of a training state are divided
over "fsdp" too, each along its largest axis (every device holds a part, and gathers what it needs when it needs it),
and whole on every device otherwise; "time" is for the window of `diffjax.parallel`. A *rule* says how an array is
divided, `rule(mesh, shape) -> PartitionSpec`. Whatever the mesh, the numbers are those of one device, up to the order
of sums.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from diffjax.levels import value

AXES = ("data", "fsdp", "time")
BATCH = ("data", "fsdp")
Rule: TypeAlias = Callable[[Mesh, tuple[int, ...]], PartitionSpec]


def mesh(description: str = "data=-1", devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a description such as ``data=4,fsdp=2,time=1``, of which one size may be -1: all that are left.

    Args:
        description: axes among data, fsdp and time with their sizes, outermost first.
        devices: default all devices, of all hosts.

    Raises:
        ValueError: unknown or repeated axes, sizes that are not positive, or that do not fit the devices.

    >>> dict(mesh("data=1", jax.devices()[:1]).shape)
    {'data': 1}
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes: dict[str, int] = {}
    for part in description.split(","):
        name, sign, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or not sign or name in sizes:
            raise ValueError(f"mesh must be like data=4,fsdp=2 with each of {AXES} at most once, got {description!r}")
        if not size.removeprefix("-").isdigit() or int(size) == 0 or int(size) < -1:
            raise ValueError(f"mesh axis {name} must have a positive size, or -1 for what is left, got {size!r}")
        sizes[name] = int(size)
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh may have one axis of size -1, got {description!r}")
    if free:
        sizes[free[0]] = max(len(devices) // -math.prod(sizes.values()), 1)
    wanted = math.prod(sizes.values())
    if wanted != len(devices):
        raise ValueError(f"mesh {description!r} does not fit: expected {wanted} devices, found {len(devices)}")
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=devices)


def automatic(mesh: Mesh) -> Mesh:
    """The same mesh with axes whose shardings the compiler propagates."""
    return mesh if set(mesh.axis_types) == {AxisType.Auto} else Mesh(mesh.devices, mesh.axis_names)


# --- what lives where ----------------------------------------------------------------------------------------------


def replicated(mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
    """The rule that every device holds every array."""
    return PartitionSpec()


@value
class FSDP:
    smallest: int
    factory = "fsdp"

    def __call__(self, mesh: Mesh, shape: tuple[int, ...]) -> PartitionSpec:
        count = mesh.shape.get("fsdp", 1)
        fitting = [(size, -axis) for axis, size in enumerate(shape) if size % count == 0 and size]
        if count == 1 or not fitting or math.prod(shape) < self.smallest:
            return PartitionSpec()
        axis = -max(fitting)[1]
        return PartitionSpec(*[None] * axis, "fsdp")


def fsdp(smallest: int = 1024) -> FSDP:
    """The rule that an array is divided over the mesh's "fsdp" axis along its largest axis that can be.

    Arrays of fewer than ``smallest`` entries, arrays that nothing divides, and all of them on a mesh without the axis
    are on every device.

    Raises ValueError for a negative ``smallest``.
    """
    if smallest < 0:
        raise ValueError(f"smallest must be at least 0, got {smallest}")
    return FSDP(smallest)


def shardings(tree: Any, mesh: Mesh, rule: Rule) -> Any:
    """The sharding of every leaf by a rule."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, rule(mesh, np.shape(leaf))), tree)


def put(tree: Any, mesh: Mesh, rule: Rule = replicated) -> Any:
    """A tree, the same on all hosts, onto the mesh by a rule."""
    return jax.tree.map(placed, tree, shardings(tree, mesh, rule))


def placed(leaf: Any, sharding: Sharding) -> jax.Array:
    """An array, the same on all hosts, onto the devices of a sharding."""
    if jax.process_count() == 1 or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(placed(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def gathered(tree: Any) -> Any:
    """A tree of arrays as NumPy arrays, on every host."""
    leaves, structure = jax.tree.flatten(tree)
    spread = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array) and not _here(leaf)}
    if spread:
        sharding: Any = next(iter(spread.values())).sharding
        whole = jax.jit(lambda leaves: leaves, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))(spread)
        leaves = [whole.get(i, leaf) for i, leaf in enumerate(leaves)]
    return structure.unflatten([np.asarray(leaf) for leaf in leaves])


def _here(leaf: jax.Array) -> bool:
    """Whether this host has all of an array."""
    return leaf.is_fully_addressable or leaf.is_fully_replicated


# --- batches -------------------------------------------------------------------------------------------------------


def batch_sharding(mesh: Mesh, axes: str | Sequence[str] | None = None) -> NamedSharding:
    """The leading axis divided over ``axes``; default those of "data" and "fsdp" that the mesh has.

    Raises ValueError for an axis that the mesh lacks.
    """
    axes = [name for name in BATCH if name in mesh.shape] if axes is None else axes
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    for axis in axes:
        if axis not in mesh.shape:
            raise ValueError(f"axis {axis!r} is not in the mesh, which has {dict(mesh.shape)}")
    return NamedSharding(mesh, PartitionSpec(axes[0] if len(axes) == 1 else axes))


@lru_cache(maxsize=32)
def batch_parts(sharding: NamedSharding) -> int:
    """How many parts a batch is divided into."""
    return sharding.num_devices // max(len(where) for where in _holders(sharding).values())


@lru_cache(maxsize=32)
def host_part(where: Mesh | NamedSharding) -> tuple[int, int]:
    """Which part of a global batch this host feeds: ``(index, count)``, the ``shard_index, shard_count`` of its data.

    Hosts whose devices hold the same rows (those of the "time" axis) feed the same part.

    Raises ValueError where the devices of a host hold parts that are not one piece of the batch.
    """
    holders = _holders(batch_sharding(where) if isinstance(where, Mesh) else where)
    parts = sorted(holders)
    own: dict[int, set[int]] = {}
    for part in parts:
        for device in holders[part]:
            own.setdefault(device.process_index, set()).add(part)
    mine = sorted(own[jax.process_index()])
    size = len(mine)
    if any(len(each) != size or min(each) % size or max(each) - min(each) + 1 != size for each in own.values()):
        raise ValueError(f"the parts of a batch that each host holds must be one piece, found {own}: reorder the mesh")
    return mine[0] // size, len(parts) // size


def _holders(sharding: NamedSharding) -> dict[int, list[Any]]:
    """The devices that hold each part of a batch."""
    count = math.prod(sharding.mesh.shape[axis] for axis in np.ravel(sharding.spec[0]).tolist())
    holders: dict[int, list[Any]] = {}
    for device, index in sharding.devices_indices_map((count,)).items():
        holders.setdefault(index[0].indices(count)[0], []).append(device)
    return holders


def place_batch(batch: Any, sharding: NamedSharding, *, parts: int = 1) -> Any:
    """This host's part of a batch (NumPy or JAX arrays) as its share of the global arrays.

    Raises ValueError where the global batch cannot be divided over the devices, or over devices times ``parts``.
    """
    hosts = host_part(sharding)[1]
    divisor = batch_parts(sharding) * parts

    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            total = leaf.shape[0]
        else:
            total = np.shape(leaf)[0] * hosts
        if total % divisor:
            over = f"the {divisor // parts} devices of mesh axis {sharding.spec[0]!r}"
            over += f" in {parts} parts" if parts > 1 else ""
            raise ValueError(f"a global batch of {total} cannot be divided over {over}: choose a multiple of {divisor}")
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(place, batch)


# --- hosts ---------------------------------------------------------------------------------------------------------


def initialise(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes of a run; before anything else touches a device.

    Args:
        coordinator: ``host:port`` of process 0; "auto" leaves all three to JAX, which knows SLURM, Open MPI,
            Kubernetes, TPU pods and the variables ``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and
            ``JAX_PROCESS_ID``; None is a run of one process, and nothing is done.
        processes, process: how many there are, and which this is.

    Raises:
        ValueError: a number of processes or a process without the others, or out of range.
        RuntimeError: devices were used before.
    """
    if coordinator is None:
        if processes is not None or process is not None:
            raise ValueError(f"processes={processes} and process={process} need the coordinator's address")
        return
    os.environ.setdefault("JAX_CPU_COLLECTIVES_IMPLEMENTATION", "gloo")
    jax.config.update("jax_cpu_collectives_implementation", os.environ["JAX_CPU_COLLECTIVES_IMPLEMENTATION"])
    if coordinator == "auto":
        jax.distributed.initialize()
        return
    if processes is None or process is None or not 0 <= process < processes:
        raise ValueError(f"process={process} must be at least 0 and below processes={processes}, both given")
    jax.distributed.initialize(coordinator, processes, process)


_meetings = itertools.count()


def meet(what: str, seconds: int = 1800) -> None:
    """Wait for the other processes: where they may be far apart, before what gives up after half a minute.

    Called alike by all processes.  Nothing for one process.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=f"diffjax {next(_meetings)}: {what}", timeout_ms=1000 * seconds)


# --- memory --------------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Bytes on one device: of the arguments, results and temporaries; ``aliased`` is what both arguments and results.

    ``peak`` is arguments + results + temporaries - aliased.
    """

    arguments: int
    results: int
    temporary: int
    aliased: int
    peak: int


def memory(step: Any, *arguments: Any) -> Memory | None:
    """What a compiled function, such as `training.train_step`, needs on each device; None where XLA does not say."""
    found = step.lower(*arguments).compile().memory_analysis()
    if found is None:
        return None
    parts = (
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.temp_size_in_bytes,
        found.alias_size_in_bytes,
    )
    return Memory(*parts, peak=sum(parts[:3]) - parts[3])
