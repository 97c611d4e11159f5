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
# # Quickstart: a diffusion model of two-dimensional data
#
# A diffusion model turns noise into data. Here the data are two interleaved half circles, the network is your own,
# and everything fits on a page: **process → network → training → sampling**. Under a minute on a laptop's CPU.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

import diffjax
from diffjax import data, training

# %% [markdown]
# ## Data and process
#
# `moons` draws one point; batches come from `jax.vmap` or from a stream. The process says how data become noise:
# `x_t = alpha(t) x_0 + sigma(t) eps`, with time from 0 (data) to 1 (noise).

# %%
process = diffjax.processes.flow()
draw_data = lambda key: data.toy.moons(key)[0]
points = jax.vmap(draw_data)(jax.random.split(jax.random.key(0), 2000))

# %% [markdown]
# ## Your own network
#
# Any function `apply(params, x, t, condition)` of **one** sample will do. This one is a perceptron with three hidden
# layers that is told the time through a few sines and cosines.


# %%
def init(key, sizes=(2 + 8, 128, 128, 128, 2)):
    keys = jax.random.split(key, len(sizes) - 1)
    pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
    return [{"w": 1.6 * jax.random.normal(k, (a, b)) / a**0.5, "b": jnp.zeros(b)} for k, a, b in pairs]


def apply(params, x, t, condition=None):
    angles = jnp.pi / 2 * t * 2.0 ** jnp.arange(4)
    h = jnp.concatenate([x, jnp.cos(angles), jnp.sin(angles)])
    for layer in params[:-1]:
        h = jax.nn.silu(h @ layer["w"] + layer["b"])
    return h @ params[-1]["w"] + params[-1]["b"]


# %% [markdown]
# ## Training
#
# The network predicts the flow's velocity. Loss, step and loop are plain functions; without `progress=False`, `fit`
# shows the time left.

# %%
prediction = diffjax.predictions.flow(process)
optimiser = training.adam(5e-3, steps=4000)
step = training.train_step(training.denoising(prediction, apply), optimiser)
state = training.init(jax.random.key(1), init(jax.random.key(2)), optimiser)
batches = data.toy.stream(data.toy.moons, jax.random.key(3), 512)
state = training.fit(state, step, batches, steps=4000, progress=False)

# %% [markdown]
# ## Sampling
#
# A prediction turns network and parameters into a denoiser, the posterior mean of the data. A grid is a sequence of
# noise levels, a solver steps along it. `sample` draws one sample; `vmap` draws many.

# %%
denoise = prediction.decode(apply, state.ema)
grid = diffjax.grids.uniform(process, steps=20)
draw = lambda key: diffjax.sample(key, denoise, diffjax.solvers.dpmpp(), grid, shape=(2,), save="states")
samples = jax.vmap(draw)(jax.random.split(jax.random.key(4), 2000))

# %% [markdown]
# ## Look at it
#
# Left the data, right the samples; between them every sample on its way from noise.

# %%
figure, axes = plt.subplots(1, 5, figsize=(14, 3), sharex=True, sharey=True, layout="constrained")
panels = {"data": points} | {f"t = {1 - i / 20:g}": samples.saved.states[:, i] for i in (0, 10, 16, 20)}
for axis, (title, cloud) in zip(axes, panels.items(), strict=True):
    axis.plot(cloud[:, 0], cloud[:, 1], ".", markersize=1.5, color="C0" if title == "data" else "C1")
    axis.set(title=title, xlim=(-3, 3), ylim=(-3, 3), aspect="equal")

# %% [markdown]
# How good is it? The sliced Wasserstein distance of the samples to fresh data, beside its floor: the distance of two
# sets of data.

# %%
fresh = jax.vmap(draw_data)(jax.random.split(jax.random.key(5), 2000))
for name, cloud in {"samples": samples.x, "data (floor)": points, "noise": samples.saved.states[:, 0]}.items():
    print(f"{name:12} {diffjax.metrics.sliced_wasserstein(jax.random.key(6), cloud, fresh):.3f}")

# %% [markdown]
# From here: other solvers (`dir(diffjax.solvers)`), the handwritten digits in `notebooks/digits.ipynb`, and the
# experiments, `python -m experiments`.
