"""The usual optimiser: Adam with linear warm-up, gradient clipping and optional cosine decay.

Any other `optax.GradientTransformation` can stand in its place.
"""

import optax


def adam(
    learning_rate: float | int = 1e-3,
    *,
    warmup: int = 100,
    steps: int | None = None,
    final: float | int = 0.0,
    clip: float | int | None = 1.0,
    weight_decay: float | int = 0.0,
    b1: float | int = 0.9,
    b2: float | int = 0.999,
) -> optax.GradientTransformation:
    """Adam (AdamW with a weight decay) on gradients clipped to a global norm.

    Args:
        learning_rate: reached after `warmup` steps, linearly from 0.
        steps: length of the run; the rate then falls to `final` along a cosine. None keeps it.
        final: the last learning rate, in units of `learning_rate`.
        clip: largest global norm of the gradient; None does not clip.
        weight_decay: decoupled decay, times the learning rate.

    Raises:
        ValueError: negative numbers, or a warm-up that is not shorter than the run.
    """
    for name, number in {"learning_rate": learning_rate, "clip": clip}.items():
        if number is not None and not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")
    if warmup < 0 or (steps is not None and warmup >= steps):
        raise ValueError(f"warmup={warmup} must be at least 0 and less than steps={steps}")
    if weight_decay < 0 or not 0 <= final <= 1:
        raise ValueError(f"weight_decay={weight_decay} must be >= 0 and final={final} in [0, 1]")
    ramp = optax.linear_schedule(0.0, learning_rate, max(warmup, 1))
    if steps is None:
        after = optax.constant_schedule(learning_rate)
    else:
        after = optax.cosine_decay_schedule(learning_rate, steps - warmup, final)
    # The ramp is shifted by one: at a rate of 0 the first step would be lost.
    schedule = optax.join_schedules([lambda step: ramp(step + 1), after], [warmup])
    clipping = optax.identity() if clip is None else optax.clip_by_global_norm(clip)
    return optax.chain(clipping, optax.adamw(schedule, b1, b2, weight_decay=weight_decay))
