"""A small convolutional classifier of images: the judge of generated ones, trained on real ones only."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from diffjax import data, training
from diffjax.levels import Array, Tree
from diffjax.networks.convolutions import Conv
from experiments import _run

FEATURES = 64


class Network(nnx.Module):
    """Three convolutions and a hidden layer, for images (H, W, C) in [-1, 1]."""

    def __init__(self, shape: tuple[int, ...], classes: int, rngs: nnx.Rngs):
        height, width, channels = shape
        self.first = Conv(channels, 32, (3, 3), rngs=rngs)
        self.second = Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.third = Conv(64, 64, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(64 * -(-height // 2) * -(-width // 2), FEATURES, rngs=rngs)
        self.out = nnx.Linear(FEATURES, classes, rngs=rngs)

    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Logits (N, classes) and features (N, FEATURES) of a batch."""
        h = nnx.relu(self.first(images))
        h = nnx.relu(self.third(nnx.relu(self.second(h))))
        features = nnx.relu(self.hidden(h.reshape(len(h), -1)))
        return self.out(features), features


class Classifier(NamedTuple):
    """A trained network; ``classifier(images)`` gives NumPy logits (N, classes) and features (N, FEATURES)."""

    graph: Any
    params: Tree

    def __call__(self, images: Array) -> tuple[np.ndarray, np.ndarray]:
        logits, features = _apply(self.graph, self.params, jnp.asarray(images))
        return np.asarray(logits), np.asarray(features)


@functools.partial(jax.jit, static_argnums=0)
def _apply(graph: Any, params: Tree, images: Array) -> tuple[Array, Array]:
    return nnx.merge(graph, params)(images)


def train(
    key: Array, images: data.Images, steps: int = 600, batch: int = 128, run: _run.Run | None = None
) -> Classifier:
    """Train on labelled images, moved by up to a pixel and with noise on top, with the library's own loop.

    With a ``run`` what was learned is kept in its folder, and a run that is resumed reads it back.

    The loss is the cross entropy with smoothed labels; the moving average of the parameters is kept.

    Raises ValueError if the images have no labels or differ in shape.
    """
    if images.shape is None or images.classes is None:
        raise ValueError(f"images must be of one shape and have labels, got {images!r}.")
    classes = images.classes
    graph, params = nnx.split(Network(images.shape, classes, nnx.Rngs(key)))

    def loss(params: Tree, key: Array, x0: Array, labels: Array) -> Array:
        logits, _ = nnx.merge(graph, params)(x0 + 0.1 * jax.random.normal(key, x0.shape))
        targets = optax.smooth_labels(jax.nn.one_hot(labels, classes), 0.05)
        return optax.softmax_cross_entropy(logits, targets)

    optimiser = training.adam(2e-3, warmup=min(50, steps - 1), steps=steps)
    step = training.train_step(loss, optimiser, training.ema.warmed(0.99))
    batches = data.batches(images, min(batch, len(images)), augment=_moved)
    kept: dict[str, Any] = {"progress": False, "save_every": steps}
    if run is not None:
        kept |= {"folder": run.folder("training/classifier"), "resume": run.resume, "report": run.log}
    state = training.fit(training.init(key, params, optimiser), step, batches, steps=steps, **kept)
    return Classifier(graph, state.ema)


def _moved(generator: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """The image shifted by -1, 0 or 1 pixels each way; what comes in is background."""
    row, column = generator.integers(0, 3, 2)
    height, width, _ = image.shape
    return np.pad(image, ((1, 1), (1, 1), (0, 0)))[row : row + height, column : column + width]
