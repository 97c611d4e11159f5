"""Small networks of a few numbers, trained in one compiled program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def init(key: Any, inputs: int, outputs: int, width: int = 32) -> list:
    """Parameters of `apply`: two hidden layers on the state and six functions of the time."""
    sizes = [inputs + 6, width, width, outputs]
    keys = jax.random.split(key, 3)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [(jax.random.normal(k, (a, b)) / jnp.sqrt(a), jnp.zeros(b)) for k, a, b in pairs]


def apply(params: list, x: Any, t: Any, condition: Any = None) -> Any:
    """A perceptron of a vector (or a number) and the time in [0, 1]."""
    waves = jnp.stack([t, jnp.sqrt(t), *(f(k * jnp.pi * t) for k in (1, 2) for f in (jnp.sin, jnp.cos))])
    h = jnp.concatenate([jnp.reshape(x, -1), waves])
    for weight, bias in params[:-1]:
        h = jax.nn.silu(h @ weight + bias)
    weight, bias = params[-1]
    return h @ weight + bias


def train(loss: Callable, params: Any, key: Any, steps: int, rate: float = 5e-3) -> Any:
    """Parameters after ``steps`` of Adam with cosine decay down ``loss(params, key)``, and the last losses' mean."""
    optimiser = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def one(carry, key):
        params, state = carry
        value, slope = jax.value_and_grad(loss)(params, key)
        updates, state = optimiser.update(slope, state)
        return (optax.apply_updates(params, updates), state), value

    (params, _), values = jax.lax.scan(one, (params, optimiser.init(params)), jax.random.split(key, steps))
    return params, values[-steps // 10 :].mean()


def minimum(loss: Callable, params: Any) -> Any:
    """Where a quadratic ``loss(params)`` of one array is least: one Newton step, with a pseudo-inverse."""
    slope, curvature = jax.grad(loss)(params), jax.hessian(loss)(params)
    size = params.size
    step = jnp.linalg.lstsq(curvature.reshape(size, size), slope.reshape(size), rcond=1e-7)[0]
    return params - step.reshape(params.shape)
