"""The training step as a pure function of state and batch, on one device or many.

    keys, losses -> gradient of the mean -> optimiser -> parameters -> moving average

The step's randomness is `fold_in(state.key, state.step)`: it depends on the number of the step alone,
which is half of what makes a resumed run exact (the other half is the data's iterator).

A loss is a function `loss(params, key, *batch) -> (B,)`. It may have more:

* `init(params) -> memory` and `advance(params, memory, key, *batch) -> (losses, memory)` (or `apply`): it remembers.
  The memory is `TrainState.loss_state`, and the gradient does not go through it.
* `draw(key, *batch) -> items` and `each(params, items) -> losses`: all that is random, or that couples samples, is
  drawn at once, and the losses of any part of the items can be computed alone. Then the parts of an accumulated
  gradient, or of `pmap`, see the very noise of the undivided batch.
* `over(axis_name) -> loss`, of one that remembers: the same on a part of the batch that `pmap` divides, given the key
  of the whole; its memory afterwards is that of the whole batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from diffjax import devices
from diffjax.devices import mesh as make_mesh
from diffjax.training import ema as averages


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    params: PyTree
    ema: PyTree
    optimiser: PyTree
    step: Int[Array, ""]
    key: PRNGKeyArray
    loss_state: PyTree = ()


class Metrics(NamedTuple):
    """What a step reports: the mean loss and the gradient's norm before clipping."""

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]


def init(
    key: PRNGKeyArray,
    params: PyTree,
    optimiser: optax.GradientTransformation,
    *,
    loss: Any = None,
    ema: Any = None,
    mesh: Mesh | None = None,
    rule: devices.Rule | None = None,
) -> TrainState:
    """The state before the first step, on the default device or on `mesh`.

    `params` are copied: a step gives the memory of its state back, and yours must survive that.

    Args:
        loss: the loss, where it has a memory (`init`).
        ema: the average, where it keeps more than one copy (`init`).
        rule: how arrays are divided over the mesh, default `devices.fsdp()`.
    """
    mesh = None if mesh is None else devices.automatic(mesh)
    rule = devices.fsdp() if rule is None else rule
    place = (lambda tree: tree) if mesh is None else (lambda tree: devices.put(tree, mesh, rule))
    # Placed one after the other: the optimiser's arrays take after the parameters and are never all on one device.
    copy = place(_copied(params))
    average = place(_copied(ema.init(params) if hasattr(ema, "init") else params))
    memory = place(_copied(loss.init(params))) if hasattr(loss, "init") else ()
    # The key is copied as well, through its data (a typed key cannot be).
    data = jnp.array(jax.random.key_data(key), copy=True)
    key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    optimiser_state, step, key = place((optimiser.init(copy), jnp.zeros((), jnp.int32), key))
    return TrainState(copy, average, optimiser_state, step, key, memory)


def _copied(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree)


def update(
    loss: Any,
    optimiser: optax.GradientTransformation,
    ema: Any = None,
    *,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The step as a plain function `(state, batch) -> (state, metrics)`, without `jit`.

    Args:
        loss: `loss(params, key, *batch) -> (B,)`, for example `losses.denoising(...)`; see above for what it may have.
        optimiser: an optax transformation.
        ema: decay as a function of the step, default `ema.warmed(0.999)`; or a value with `init(params)` and
            `update(average, params, step)`.
        accumulate: the batch goes through the network in so many parts, one after the other, and the gradient is
            that of the whole: up to rounding where the loss can `draw`, in law otherwise. A loss with a memory
            has seen the parts before when it comes to the next.
        axis_name: the axis of `pmap` (or `shard_map`) that the batch is divided over. The memory of a loss without
            `over` is then averaged: the memory of the whole batch wherever it is affine in means over the batch.

    Raises:
        ValueError: accumulate < 1; when called, a batch that does not divide into so many parts.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    ema = averages.warmed() if ema is None else ema

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        value, memory, gradient = _gradient(loss, accumulate, axis_name, state, key, batch)
        changes, optimiser_state = optimiser.update(gradient, state.optimiser, state.params)
        params = optax.apply_updates(state.params, changes)
        if hasattr(ema, "update"):
            average = ema.update(state.ema, params, state.step)
        else:
            average = averages.update(state.ema, params, ema(state.step))
        metrics = Metrics(value, optax.tree.norm(gradient))
        return TrainState(params, average, optimiser_state, state.step + 1, state.key, memory), metrics

    return step


def _gradient(
    loss: Any, accumulate: int, axis_name: str | None, state: TrainState, key: PRNGKeyArray, batch: Any
) -> tuple[Float[Array, ""], PyTree, PyTree]:
    """The mean loss, the loss's memory after it, and the gradient of the mean."""
    remembers = hasattr(loss, "init")
    alike = axis_name is not None and hasattr(loss, "over")
    loss = loss.over(axis_name) if alike else loss
    drawn = hasattr(loss, "draw") and not remembers
    advance = getattr(loss, "advance", None) or getattr(loss, "apply", None)
    divided = accumulate > 1 or axis_name is not None
    if drawn and divided:
        batch = loss.draw(key, *whole_batch(batch, axis_name))
        batch = own_part(batch, axis_name)
    elif axis_name is not None and not alike:
        key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))

    def mean(params: PyTree, memory: PyTree, key: PRNGKeyArray, part: Any) -> tuple[Float[Array, ""], PyTree]:
        if remembers and advance is not None:
            losses, memory = advance(params, memory, key, *part)
        else:
            losses = loss.each(params, part) if drawn and divided else loss(params, key, *part)
        return jnp.mean(losses), jax.lax.stop_gradient(memory)

    def one(memory: PyTree, key: PRNGKeyArray, part: Any) -> tuple[PyTree, tuple[Float[Array, ""], PyTree]]:
        (value, memory), gradient = jax.value_and_grad(mean, has_aux=True)(state.params, memory, key, part)
        return memory, (value, gradient)

    if accumulate == 1:
        memory, (value, gradient) = one(state.loss_state, key, batch)
    else:
        shapes = jax.eval_shape(lambda: one(state.loss_state, key, _parts(batch, accumulate, 0))[1])
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

        def add(carry: tuple, item: tuple) -> tuple[tuple, None]:
            memory, total = carry
            memory, found = one(memory, jax.random.fold_in(key, item[0]), item[1])
            return (memory, jax.tree.map(jnp.add, total, found)), None

        items = (jnp.arange(accumulate), _parts(batch, accumulate))
        (memory, total), _ = jax.lax.scan(add, (state.loss_state, nothing), items)
        value, gradient = jax.tree.map(lambda leaf: leaf / accumulate, total)
    if axis_name is not None:
        inexact = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        memory = jax.tree.map(lambda leaf: jax.lax.pmean(leaf, axis_name) if inexact(leaf) else leaf, memory)
        value, gradient = jax.lax.pmean((value, gradient), axis_name)
    return value, memory, gradient


def _parts(batch: Any, count: int, index: int | None = None) -> Any:
    """Samples i, i + count, ... as part i: on a mesh every device then has its share of every part."""

    def split(leaf: Array) -> Array:
        if leaf.shape[0] % count:
            raise ValueError(f"a batch of {leaf.shape[0]} cannot be accumulated in {count} equal parts")
        parts = leaf.reshape(-1, count, *leaf.shape[1:]).swapaxes(0, 1)
        return parts if index is None else parts[index]

    return jax.tree.map(split, batch)


def whole_batch(batch: Any, axis_name: str | None) -> Any:
    """The batch of all devices of a `pmap`."""
    if axis_name is None:
        return batch
    return jax.tree.map(lambda leaf: jax.lax.all_gather(leaf, axis_name, tiled=True), batch)


def own_part(items: Any, axis_name: str | None) -> Any:
    """This device's part of what was drawn for all."""
    if axis_name is None:
        return items
    count = jax.lax.axis_size(axis_name)

    def part(leaf: Array) -> Array:
        return leaf.reshape(count, -1, *leaf.shape[1:])[jax.lax.axis_index(axis_name)]

    return jax.tree.map(part, items)


@dataclass(frozen=True, eq=False)
class Step:
    """A compiled training step; `lower(state, batch)` is that of `jax.jit`."""

    pure: Callable
    sharding: NamedSharding | None
    accumulate: int
    programs: dict[Any, Any]

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        batch, program = self._placed(batch), self._program(state)
        if jax.process_count() > 1:
            program = self._met(program, state, batch)
        return program(state, batch)

    def _met(self, program: Any, state: TrainState, batch: Any) -> Any:
        """What all processes have compiled, so that none waits at the first collective for another's compiler."""
        shapes = (program, *(jax.typeof(leaf) for leaf in jax.tree.leaves(batch)))
        if shapes not in self.programs:
            self.programs[shapes] = program.lower(state, batch).compile()
            devices.meet("the step is compiled")
        return self.programs[shapes]

    def lower(self, state: TrainState, batch: Any) -> Any:
        return self._program(state).lower(state, self._placed(batch))

    def described(self, batch: Any) -> list[Any]:
        """Type and shape of every array of the global batch, as JSON."""
        return [[str(leaf.dtype), *leaf.shape] for leaf in jax.tree.leaves(self._placed(batch))]

    def _placed(self, batch: Any) -> Any:
        if self.sharding is None:
            return batch
        return devices.place_batch(batch, self.sharding, parts=self.accumulate)

    def _program(self, state: TrainState) -> Any:
        """What is compiled for a state: one that comes out lies on the devices as it came in."""
        if self.sharding is None:
            return self.programs.setdefault(None, jax.jit(self.pure, donate_argnums=0))
        leaves, tree = jax.tree.flatten(jax.tree.map(lambda leaf: leaf.sharding, state))
        name = (tree, *leaves)
        if name not in self.programs:
            mesh = self.sharding.mesh
            if any(leaf.device_set != self.sharding.device_set for leaf in leaves):
                raise ValueError(f"the state must be on the mesh {dict(mesh.shape)}: training.init(..., mesh=mesh)")
            out = (jax.tree.unflatten(tree, leaves), NamedSharding(mesh, PartitionSpec()))
            self.programs[name] = jax.jit(self.pure, donate_argnums=0, out_shardings=out)
        return self.programs[name]


def train_step(
    loss: Any,
    optimiser: optax.GradientTransformation,
    ema: Any = None,
    *,
    mesh: Mesh | None = None,
    axis: str | Sequence[str] | None = None,
    accumulate: int = 1,
) -> Step:
    """The compiled step `(state, batch) -> (state, metrics)`; the memory of `state` is reused.

    Args:
        loss, optimiser, ema, accumulate: as for `update`.
        mesh: train on the devices of this mesh; `state` must be on it (`init(..., mesh=mesh)`), and stays divided as
            it is. The batch is this process's part of the global batch, in NumPy or on the device.
        axis: the mesh axes that the batch is divided over, default those of "data" and "fsdp" that there are.

    The loss and its gradient are those of a single device, up to the order of summation.

    Raises:
        ValueError: an axis that the mesh lacks; at the first step, a batch that does not divide.
    """
    pure = update(loss, optimiser, ema, accumulate=accumulate)
    sharding = None if mesh is None else devices.batch_sharding(devices.automatic(mesh), axis)
    return Step(pure, sharding, accumulate, {})


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """All devices (or those given) along one axis named "data"."""
    return make_mesh(devices=devices)
