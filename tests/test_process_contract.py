"""The contract of a process: solvers that know nothing of it converge to its exact flow and its exact law.

Over every public process of Gaussian noise, in its standard coordinates, with independent Gaussian data.  A solver may
refuse a process (stages between the noise levels of many modes, a start that is known), but not fail on it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from diffjax import coordinates, grids, likelihood, oracles, processes, solvers
from diffjax.catalogue import catalogue
from tests import contract

Y, FOUR = np.full(4, 2.0), np.arange(4)
COSINES, FLOW = coordinates.dct((0,)), processes.flow()
LIKE = {"a": np.zeros(2), "b": np.zeros(2)}
TABLE = {
    "blurred": processes.changed(processes.blurred(processes.cosine(), COSINES.frequencies((4,)), 2.0), COSINES),
    "brownian_bridge": processes.brownian_bridge(Y),
    "changed": processes.changed(processes.vp(), coordinates.haar(1, (0,))),
    "coloured": processes.coloured(FLOW, np.eye(4) + 0.5),
    "consecutive_bridges": processes.consecutive_bridges(Y, -Y)[0],
    "cosine": processes.cosine(),
    "damped": processes.damped(FLOW, strength=0.2),
    "ddpm": processes.ddpm(100),
    "decomposable": processes.decomposable((4,), 1, (0,)),
    "diffuse_vae": processes.diffuse_vae(processes.vp(), Y),
    "edm": processes.edm(5.0),
    "flow": FLOW,
    "functional": processes.functional(1 + 0.3 * FOUR, 1 / (1.0 + FOUR**2), end=2.0),
    "gaussian": processes.gaussian(lambda t: 1 - 0.8 * t, lambda t: t),
    "gaussian_prior": processes.gaussian_prior(FLOW, Y, np.full(4, 0.4)),
    "learned": processes.learned(np.array([1.0, 0.0, -1.0]), 3.0, -3.0),
    "modal": processes.modal((FLOW, processes.cosine()), np.array([0, 1, 0, 1])),
    "ouve": processes.ouve(Y),
    "product": processes.product({"a": processes.vp(), "b": processes.ve(0.02, 5.0)}, LIKE),
    "relay": processes.relay(processes.edm(5.0), (4,), 2, 0.5, 2.0, axes=(0,)),
    "resfusion": processes.resfusion(Y, processes.vp()),
    "residual": processes.residual(Y),
    "resshift": processes.resshift(Y, kappa=1.0),
    "scaled_time": processes.scaled_time(FLOW),
    "shared_noise": processes.shared_noise(FLOW, np.array([0.0, 0.5, 0.3, 0.2])),
    "shared_time": processes.shared_time(processes.ddpm(100), 10.0),
    "shifted": processes.shifted(FLOW, Y),
    "sub_vp": processes.sub_vp(),
    "table": processes.table(np.linspace(1e-3, 0.2, 50)),
    "temporal": processes.temporal(FLOW, np.array([0.0, 0.1, 0.4, 0.9])),
    "ve": processes.ve(0.02, 5.0),
    "vp": processes.vp(),
    "zero_terminal_snr": processes.zero_terminal_snr(processes.ddpm(100)),
}
MEAN, SPREAD = np.array([0.5, -0.3, 0.1, 0.4]), np.array([1.2, 0.5, 0.8, 0.3])
SOME = {
    "ddim": solvers.ddim(),
    "dpmpp": solvers.dpmpp(),
    "ancestral": solvers.ancestral(),
}


def denoise(x, level):
    gain = level.alpha * SPREAD**2 / (level.alpha**2 * SPREAD**2 + level.sigma**2)
    return MEAN + gain * (x - level.alpha * MEAN)


def grid_of(process, steps, first=0.85, last=0.05):
    times = float(process.end) * np.linspace(first, last, steps + 1)
    if process.schedule is TABLE["decomposable"].schedule:  # a clock for every entry
        times = times[:, None] ** np.array([1.0, 1.0, 1.1, 1.1])
    return grids.times(process, times)


def error(process, solver, steps):
    """Of the flow, or for a stochastic step of mean and standard deviation, relative to the data's scale."""
    grid = grid_of(process, steps)
    rows = solver.plan(grid)
    first, last = contract.at(rows, 0).t, contract.at(rows, contract.length(rows) - 1).s
    std = [np.sqrt(level.alpha**2 * SPREAD**2 + level.sigma**2) for level in (first, last)]
    x = first.alpha * MEAN + std[0] * np.array([[-1.3], [0.4], [1.0]])
    if not solver.draws:
        exact = last.alpha * MEAN + std[1] / std[0] * (x - first.alpha * MEAN)
        return float(np.max(np.abs(contract.run(solver, denoise, x, rows)[-1] - exact)))
    mean, variance = first.alpha * MEAN, std[0] ** 2
    for i in range(contract.length(rows)):
        row, pair = contract.at(rows, i), np.stack([0 * mean, 0 * mean + 1.0])
        kept, scale = solver.kernel(pair, denoise(pair, row.t), row)
        mean, variance = kept[0] + (kept[1] - kept[0]) * mean, (kept[1] - kept[0]) ** 2 * variance + scale**2
    return float(np.max(np.abs(mean - last.alpha * MEAN) + np.abs(np.sqrt(variance) - std[1])))


def test_every_public_process_is_here():
    assert set(TABLE) == set(catalogue(processes))


@pytest.mark.parametrize("name", TABLE)
def test_solvers_converge_on_every_process(name):
    process, refused = TABLE[name], []
    for label, solver in SOME.items():
        try:
            errors = [error(process, solver, steps) for steps in (16, 64)]
        except ValueError as problem:
            assert any(word in str(problem) for word in ("one time", "known", "levels")), problem
            refused.append(label)
            continue
        assert errors[1] < max(0.36 * errors[0], 1e-9), (label, errors)  # order 1: a quarter
        assert errors[1] < 0.1, (label, errors)
    assert len(refused) < 2, refused


def test_log_likelihood_on_every_process(x64):
    """Within 1e-4 nats of the closed form, with the exact law at the noisy end; coordinates count their Jacobian."""
    law = oracles.gaussian(MEAN, SPREAD**2)
    for name, process in TABLE.items():
        grid = grid_of(process, 160)
        first, last = (jax.tree.map(lambda leaf, i=i: leaf[i], part) for part, i in ((grid.t, 0), (grid.s, -1)))
        z = jnp.asarray(last.alpha * MEAN + np.sqrt(last.alpha**2 * SPREAD**2 + last.sigma**2) * [0.4, -1.1, 0.2, 0.9])
        x = process.leave(z, last)
        found = likelihood.log_density(x, law, grid, prior=law.log_density)
        basis = jax.vmap(lambda e, p=process: ravel_pytree(p.leave(e))[0])(jnp.eye(4))
        exact = law.log_density(z, last) - np.linalg.slogdet(basis)[1]
        np.testing.assert_allclose(found.log_density, exact, atol=1e-4, err_msg=name)
        np.testing.assert_allclose(
            found.log_prior + found.log_volume, found.log_density, rtol=1e-9, err_msg=f"{name} {first.time}"
        )


def test_entry_and_exit_are_inverse_on_every_process():
    for name, process in TABLE.items():
        level = process.level(grid_of(process, 2).t.time[0])
        x = LIKE if name == "product" else np.array([0.3, -1.2, 0.8, 2.0])
        z = process.enter(x, level)
        back = process.leave(z, level)
        for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(x), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)
