"""Classifier guidance: the gradient of a classifier's log-probability, of the noisy state or of the clean estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffjax.guidance.tilted import Tilted, tilted
from diffjax.levels import Array, Level, Tree, as_value, is_traced, root, static, value

INPUTS = ("state", "estimate")


def classifier(
    denoise: Any,
    logits: Callable[..., Array],
    label: Array,
    scale: Any = 1.0,
    joint: Array = 1.0,
    marginal: Array = 1.0,
    on: str = "state",
) -> Tilted:
    """``x0 + scale sigma^2 / alpha grad_x log p(label | x_t)`` with the probabilities of a classifier (`class_twist`).

    With the exact classifier of noisy states and scale 1 it is the conditional denoiser; scale 0 is ``denoise``.

    Args:
        denoise: a denoiser that does not remember.
        logits, label, joint, marginal, on: see `class_twist`.
        scale: a number or a function of the level (`interval`, `sine`).

    Network evaluations: those of ``denoise`` (its derivative and the classifier are not counted).

    Diffusion Models Beat GANs on Image Synthesis, arXiv:2105.05233 (on the state), and
    Elucidating The Design Space of Classifier-Guided Diffusion Generation, arXiv:2310.11311 (a classifier of clean data
    on the estimate, two temperatures, a scale that is largest in the middle).

    Raises ValueError as `tilted` and `class_twist`.
    """
    return tilted(denoise, class_twist(logits, label, joint, marginal, on), scale)


def class_twist(
    logits: Callable[..., Array], label: Array, joint: Array = 1.0, marginal: Array = 1.0, on: str = "state"
) -> ClassTwist:
    """A twist ``log h = joint f_y - logsumexp(marginal f)`` with a classifier's logits f.

    With both temperatures 1 it is log p(y | .).  A lower ``marginal`` takes weight from the second term, the marginal
    density that an off-the-shelf classifier has learned badly, so that what is climbed is the joint one, log p(x, y).

    Args:
        logits: ``(x, level) -> f`` of shape (classes,) with on="state", a classifier trained on noisy states;
            ``x0 -> f`` with on="estimate", one of clean data, which sees the clean estimate.  Best a value.
        label: the class, an integer.
        joint, marginal: inverse temperatures, at least 0.

    Elucidating The Design Space of Classifier-Guided Diffusion Generation, arXiv:2310.11311.

    Raises ValueError for temperatures below 0, or another ``on``.
    """
    for name, number in (("joint", joint), ("marginal", marginal)):
        if not is_traced(number) and not (np.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be finite and at least 0, got {number!r}.")
    if on not in INPUTS:
        raise ValueError(f"on must be among {INPUTS}, got {on!r}.")
    return ClassTwist(as_value(logits), label, joint, marginal, on)


@value
class ClassTwist:
    logits: Any
    label: Array
    joint: Array
    marginal: Array
    on: str = static()
    factory = "class_twist"

    def __call__(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree]:
        x0 = denoise(x, level)
        return self._log(self.logits(x, level) if self.on == "state" else self.logits(x0)), x0

    def _log(self, f: Array) -> Array:
        return self.joint * f[self.label] - jax.nn.logsumexp(self.marginal * f)

    def gradient(self, denoise: Any, x: Tree, level: Level) -> tuple[Array, Tree, Tree]:
        """Autodiff's; on the state the denoiser is not differentiated."""
        if self.on == "state":
            log_h, gradient = jax.value_and_grad(lambda x: self._log(self.logits(x, level)))(x)
            return log_h, denoise(x, level), gradient
        (log_h, x0), gradient = jax.value_and_grad(lambda x: self(denoise, x, level), has_aux=True)(x)
        return log_h, x0, gradient


def boundary_distance(margin: Callable[[Tree], Array], x: Tree) -> Array:
    """``margin / |grad margin|``: how far a state is from a decision boundary, to first order; negative beyond it.

    ``margin`` is the log-odds of the class, 0 on the boundary; exact where it is linear.  Guidance drives samples away
    from the boundary.

    Studying Classifier(-Free) Guidance From a Classifier-Centric Perspective, arXiv:2503.10638.
    """
    number, slope = jax.value_and_grad(margin)(x)
    steep = root(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(slope)))
    return number / jnp.where(steep > 0, steep, 1.0)


def fitted_temperature(logits: Array, labels: Array) -> float:
    """The inverse temperature at which logits (N, classes) are the most likely given labels (N,), by Newton's method.

    Multiplied by it, the logits of an overconfident classifier are calibrated; above 0, in NumPy.

    Raises ValueError for shapes that do not fit.
    """
    f, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if f.ndim != 2 or labels.shape != f.shape[:1]:
        raise ValueError(f"logits must be (N, classes) and labels (N,), got {f.shape} and {labels.shape}.")
    own, inverse = f[np.arange(len(f)), labels], 1.0
    for _ in range(50):
        weights = np.exp(inverse * (f - f.max(1, keepdims=True)))
        weights /= weights.sum(1, keepdims=True)
        mean = (weights * f).sum(1)
        slope = np.mean(own - mean)
        bend = np.mean((weights * (f - mean[:, None]) ** 2).sum(1))
        # in the logarithm of the temperature, so that it stays above 0; steps of at most 1
        step = slope / max(bend * inverse, 1e-12)
        inverse *= np.exp(np.clip(step, -1.0, 1.0))
        if abs(step) < 1e-10:
            break
    return float(inverse)
