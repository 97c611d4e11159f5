# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Handwritten digits: solvers, guidance, trajectories
#
# The model is the one that `make demo` trains: a class-conditional U-Net on 8 × 8 digits, by flow matching. If you
# have run the demo, its checkpoint is used; otherwise a smaller one is trained here, in about a minute.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import diffjax
from diffjax import data, networks, training
from experiments import _plots, digits

# %%
process = diffjax.processes.flow()
prediction = diffjax.predictions.flow(process)
if (digits.Options.out / "metrics.json").exists():  # the demo has run to its end
    model = digits.load(digits.Options.out)
    print(f"the demo's model, {networks.count(model.params):,} parameters")
else:
    unet = networks.UNet((8, 8, 1), channels=(16, 32), condition=networks.label(10), rngs=nnx.Rngs(0))
    apply, params = networks.functional(unet)
    optimiser = training.adam(4e-3, steps=1000)
    step = training.train_step(training.denoising(prediction, apply, dropout=0.1, null=10), optimiser)
    batches = data.batches(data.load("digits", "train"), 64)
    state = training.fit(training.init(jax.random.key(1), params, optimiser), step, batches, steps=1000, progress=False)
    model = digits.Model(apply, jax.device_get(state.ema))
    print(f"trained here, {networks.count(params):,} parameters")

# %% [markdown]
# ## One digit
#
# A prediction turns the network into a denoiser, with its condition bound: `denoise(x, level)` is the mean of all
# digits of the class that could have become `x`. Sampling is one call.

# %%
grid = diffjax.grids.uniform(process, steps=20)
denoise = prediction.decode(model.apply, model.params, condition=np.int32(3))
three = diffjax.sample(
    jax.random.key(3), denoise, diffjax.solvers.dpmpp(), grid, shape=(8, 8, 1), save=("states", "x0")
)
print(f"{int(three.nfe)} network evaluations, non-finite at step {int(three.failed_at)} (-1: never)")

# %% [markdown]
# ## Its trajectory
#
# Above the state on its way from noise, below the clean estimate that the network made of it. The estimate begins as
# the mean of all threes and becomes one of them.

# %%
show = lambda images: np.clip((np.asarray(images)[..., 0] + 1) / 2, 0, 1)
steps = np.arange(0, 20, 2)
figure, axis = plt.subplots(figsize=(10, 2.4), layout="constrained")
_plots.image_grid(axis, np.stack([show(three.saved.states[steps]), show(three.saved.x0[steps])]))
axis.set_xticks(np.arange(len(steps)) * 10 + 4.5, [f"t = {t:.1f}" for t in three.saved.x0_level.time[steps]])
axis.set_yticks([4.5, 14.5], ["state", "clean estimate"])
plt.show()

# %% [markdown]
# ## Solvers
#
# Every column starts from the same noise. Three steps already give digits, a little soft; with many steps all
# deterministic solvers agree, because they follow the same flow. The stochastic one goes elsewhere.

# %%
labels = np.arange(10)


def draw_all(solver, steps, scale=1.0):
    """One digit of every class."""
    grid = diffjax.grids.uniform(process, steps)

    def draw(key, label):
        denoise = prediction.decode(model.apply, model.params, condition=label)
        guided = diffjax.guidance.classifier_free(denoise, null=10, scale=scale)
        return diffjax.sample(key, guided, solver, grid, shape=(8, 8, 1)).x

    return show(jax.vmap(draw)(jax.random.split(jax.random.key(1), 10), labels))


rows = {
    "ddim, 3": (diffjax.solvers.ddim(), 3),
    "dpmpp, 3": (diffjax.solvers.dpmpp(), 3),
    "ddim, 50": (diffjax.solvers.ddim(), 50),
    "dpmpp, 50": (diffjax.solvers.dpmpp(), 50),
    "heun, 25": (diffjax.solvers.heun(), 25),
    "ancestral, 50": (diffjax.solvers.ancestral(), 50),
}
figure, axis = plt.subplots(figsize=(7, 4.4), layout="constrained")
_plots.image_grid(axis, np.stack([draw_all(*row) for row in rows.values()]))
axis.set_yticks(np.arange(len(rows)) * 10 + 4.5, [f"{name} steps" for name in rows])
plt.show()

# %% [markdown]
# ## Guidance
#
# Classifier-free guidance goes from the unconditional estimate through the conditional one and beyond it. Scale 0
# ignores the class, 1 is the conditional model, larger scales make digits more typical and more alike.

# %%
scales = (0.0, 1.0, 2.0, 4.0)
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
_plots.image_grid(axis, np.stack([draw_all(diffjax.solvers.dpmpp(), 20, scale) for scale in scales]))
axis.set_yticks(np.arange(len(scales)) * 10 + 4.5, [f"scale {scale:g}" for scale in scales])
axis.set_xticks(labels * 10 + 4.5, labels)
axis.set_xlabel("class asked for")
plt.show()

# %% [markdown]
# ## From one digit towards another
#
# `start` noises a given image up to a time and goes on from there: the later the time, the more of the image is
# forgotten. Here a three is noised and denoised as an eight.

# %%
starts = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
eight = prediction.decode(model.apply, model.params, condition=np.int32(8))
edit = lambda start: (
    diffjax.sample(
        jax.random.key(2), eight, diffjax.solvers.dpmpp(), diffjax.grids.uniform(process, 20), x=three.x, start=start
    ).x
)
figure, axis = plt.subplots(figsize=(7, 1.5), layout="constrained")
_plots.image_grid(axis, show(np.stack([three.x, *map(edit, starts)]))[None])
axis.set_xticks(np.arange(7) * 10 + 4.5, ["the three", *(f"from t = {t:g}" for t in starts)])
plt.show()
