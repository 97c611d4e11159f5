"""The training step as a pure function of state and batch, on one device or many.

    keys, losses -> gradient of the mean -> optimiser -> parameters -> moving average

The step's randomness is `fold_in(state.key, state.step)`: it depends on the number of the step alone,
which is half of what makes a resumed run exact (the other half is the data's iterator).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from diffjax.training import ema as averages


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    params: PyTree
    ema: PyTree
    optimiser: PyTree
    step: Int[Array, ""]
    key: PRNGKeyArray


class Metrics(NamedTuple):
    """What a step reports: the mean loss and the gradient's norm before clipping."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]


def init(
    key: PRNGKeyArray, params: PyTree, optimiser: optax.GradientTransformation, *, mesh: Mesh | None = None
) -> TrainState:
    """The state before the first step, on the default device or replicated over `mesh`.

    `params` are copied: a step gives the memory of its state back, and yours must survive that.
    """
    copy, average = (jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params) for _ in range(2))
    # The key is copied as well, through its data (a typed key cannot be).
    data = jnp.array(jax.random.key_data(key), copy=True)
    key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    state = TrainState(copy, average, optimiser.init(copy), jnp.zeros((), jnp.int32), key)
    return state if mesh is None else jax.device_put(state, NamedSharding(mesh, PartitionSpec()))


def update(
    loss: Callable, optimiser: optax.GradientTransformation, ema: averages.Decay | None = None
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The step as a plain function `(state, batch) -> (state, metrics)`, without `jit`.

    Args:
        loss: `loss(params, key, *batch) -> (B,)`, for example `losses.denoising(...)`.
        optimiser: an optax transformation.
        ema: decay as a function of the step; default `ema.warmed(0.999)`.
    """
    ema = averages.warmed() if ema is None else ema

    def mean(params: PyTree, key: PRNGKeyArray, batch: Any) -> Float[Array, ""]:
        return jnp.mean(loss(params, key, *batch))

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        value, gradient = jax.value_and_grad(mean)(state.params, key, batch)
        changes, memory = optimiser.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, changes)
        average = averages.update(state.ema, params, ema(state.step))
        metrics = Metrics(value, optax.tree.norm(gradient))
        return TrainState(params, average, memory, state.step + 1, state.key), metrics

    return step


def train_step(
    loss: Callable,
    optimiser: optax.GradientTransformation,
    ema: averages.Decay | None = None,
    *,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The compiled step `(state, batch) -> (state, metrics)`; the memory of `state` is reused.

    Args:
        loss, optimiser, ema: as for `update`.
        mesh: data-parallel over this mesh; `state` must be on it (`init(..., mesh=mesh)`). The batch
            is this process's part of the global batch, in NumPy or on the device.
        axis: the mesh axis that the batch is divided over.

    The loss and its gradient are those of a single device, up to the order of summation.

    Raises:
        ValueError: an axis that the mesh lacks; at the first step, a batch that does not divide.
    """
    pure = update(loss, optimiser, ema)
    if mesh is None:
        return jax.jit(pure, donate_argnums=0)
    if axis not in mesh.shape:
        raise ValueError(f"axis {axis!r} is not in the mesh, which has {dict(mesh.shape)}")
    replicated = NamedSharding(mesh, PartitionSpec())
    divided = NamedSharding(mesh, PartitionSpec(axis))
    compiled = jax.jit(pure, donate_argnums=0, out_shardings=replicated)

    def place(leaf: Any) -> Array:
        total = np.shape(leaf)[0] * jax.process_count()
        if total % mesh.shape[axis]:
            raise ValueError(
                f"a global batch of {total} cannot be divided over the {mesh.shape[axis]} devices of"
                f" mesh axis {axis!r}: choose a multiple of {mesh.shape[axis]}"
            )
        if isinstance(leaf, jax.Array) and leaf.sharding == divided:
            return leaf
        return jax.make_array_from_process_local_data(divided, np.asarray(leaf))

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        return compiled(state, jax.tree.map(place, batch))

    return step


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """All devices (or those given) along one axis named "data"."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
