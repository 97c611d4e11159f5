"""Toy data in the plane, as pure functions `draw(key) -> (x, label)` of one sample.

Each set has mean about zero and standard deviation about one in each coordinate, and labels that
make sense as classes. `jax.vmap(draw)(jax.random.split(key, n))` draws many, and `stream` feeds
them to the training loop. For exact densities and denoisers see `diffjax.oracles`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from diffjax.data.sets import Batch

Draw = Callable[[PRNGKeyArray], tuple[Float[Array, " 2"], Int[Array, ""]]]


def moons(key: PRNGKeyArray, noise: float | int = 0.1) -> tuple[Float[Array, " 2"], Int[Array, ""]]:
    """Two interleaved half circles with Gaussian noise; the label (0, 1) tells which."""
    key_side, key_angle, key_noise = jax.random.split(key, 3)
    side = jax.random.bernoulli(key_side).astype(jnp.int32)
    angle = jnp.pi * jax.random.uniform(key_angle)
    sign = 1 - 2 * side
    # The circles are centred on (0, 0) and (1, 1/2); what is subtracted is the mean of both.
    x = jnp.stack([sign * jnp.cos(angle) + side, sign * jnp.sin(angle) + side / 2])
    x = x - jnp.array([0.5, 0.25]) + noise * jax.random.normal(key_noise, (2,))
    return x / jnp.array([0.87, 0.5]), side


def checkerboard(key: PRNGKeyArray, cells: int = 4) -> tuple[Float[Array, " 2"], Int[Array, ""]]:
    """Uniform on the black cells of a `cells` x `cells` board; the label (0, 1) is the row's parity."""
    key_row, key_column, key_inside = jax.random.split(key, 3)
    row = jax.random.randint(key_row, (), 0, cells)
    column = 2 * jax.random.randint(key_column, (), 0, cells // 2) + row % 2
    corner = jnp.stack([column, row]) + jax.random.uniform(key_inside, (2,))
    # A uniform variable on an interval of length 2 sqrt(3) has unit variance.
    return (corner / cells - 0.5) * 12**0.5, row % 2


def swiss_roll(key: PRNGKeyArray, noise: float | int = 0.05) -> tuple[Float[Array, " 2"], Int[Array, ""]]:
    """A spiral of one and a half turns; the label (0, 1, 2) is the half turn, from the inside."""
    key_angle, key_noise = jax.random.split(key)
    turn = 3 * jax.random.uniform(key_angle)
    angle = jnp.pi * (1.5 + turn)
    x = angle * jnp.stack([jnp.cos(angle), jnp.sin(angle)]) / (4.5 * jnp.pi)
    # The mean and standard deviation of the noiseless spiral.
    x = (x - jnp.array([0.1415, 0.0150])) / jnp.array([0.4685, 0.4917])
    return x + noise * jax.random.normal(key_noise, (2,)), turn.astype(jnp.int32)


def mixture(
    key: PRNGKeyArray, modes: int = 8, radius: float | int = 1.4, scale: float | int = 0.15
) -> tuple[Float[Array, " 2"], Int[Array, ""]]:
    """`modes` equal Gaussians of standard deviation `scale` on a circle; the label is the mode."""
    key_mode, key_noise = jax.random.split(key)
    mode = jax.random.randint(key_mode, (), 0, modes)
    angle = 2 * jnp.pi * mode / modes
    centre = radius * jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    return centre + scale * jax.random.normal(key_noise, (2,)), mode


class Stream:
    """An endless iterator over fresh batches of a toy set; see `stream`."""

    def __init__(self, draw: Callable, key: PRNGKeyArray, size: int):
        def batch(key: PRNGKeyArray, index: Int[Array, ""]) -> Batch:
            keys = jax.random.split(jax.random.fold_in(key, index), size)
            return Batch(*jax.vmap(draw)(keys))

        self._key, self._batch, self._index = key, jax.jit(batch), 0

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Batch:
        batch = self._batch(self._key, self._index)
        self._index += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The number of the next batch."""
        return {"next_index": self._index}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue at a state from `get_state`."""
        self._index = int(state["next_index"])


def stream(draw: Draw, key: PRNGKeyArray, size: int) -> Stream:
    """Fresh batches of `size` samples of `draw`, forever, with `get_state()` and `set_state(state)`."""
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size!r}")
    return Stream(draw, key, size)
