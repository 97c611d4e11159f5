"""Cheap denoiser (a 2-D mixture, 50 steps): diffjax against a hand-written scan, diffrax, and PyTorch peers.

`python -m benchmarks.oracle`; with `--peers PYTHON`, a Python that has torch, diffusers and k-diffusion, those too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp

import diffjax
from benchmarks.problem import COVARIANCES, MEANS, STEPS, WEIGHTS
from benchmarks.timing import interleaved, save

MIXTURE = diffjax.oracles.mixture(WEIGHTS, MEANS, COVARIANCES)
PROCESS = diffjax.processes.vp()
GRID = diffjax.grids.log_snr(PROCESS, STEPS, to_data=False)


def start(key):
    """The draw that `sample` starts from: every contestant makes the same one."""
    return jax.random.normal(jax.random.split(key)[0], (2,))


def hand_written(key):
    """DDIM in the fewest lines: what a user would write for this one case."""
    rows = diffjax.solvers.ddim().plan(GRID)
    coefficients = jnp.stack(rows.coefficients.out, axis=1, dtype=jnp.float32)
    levels = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), rows.t)
    x = levels.sigma[0] * start(key)

    def body(x, row):
        (keep, weight), level = row
        return keep * x + weight * MIXTURE(x, level), None

    return jax.lax.scan(body, x, (coefficients, levels))[0]


def diffjax_sample(solver):
    """The sampler's state for one key."""
    return lambda key: diffjax.sample(key, MIXTURE, solver, GRID, shape=(2,)).x


def eager():
    """One call outside jit, with the solver made anew."""
    return diffjax.sample(jax.random.key(0), MIXTURE, diffjax.solvers.ddim(), GRID, shape=(2,)).x


def diffrax_euler(key):
    """Euler on the probability-flow ODE with fixed steps."""
    velocity = PROCESS.probability_flow(MIXTURE)
    term = diffrax.ODETerm(lambda t, x, args: velocity(x, t))
    return _diffeqsolve(term, start(key))


def diffrax_euler_maruyama(key):
    """Euler-Maruyama on the reverse SDE in forward-running time, with diffrax's cheapest Brownian path."""
    sde = PROCESS.reverse_sde(MIXTURE)
    path = diffrax.UnsafeBrownianPath(shape=(2,), key=key)
    drift = diffrax.ODETerm(lambda u, x, args: -sde.drift(x, 1.0 - u))
    noise = diffrax.ControlTerm(lambda u, x, args: diffrax_scalar(sde.diffusion(x, 1.0 - u)), path)
    return _diffeqsolve(diffrax.MultiTerm(drift, noise), start(key), 0.0, 0.999, 0.999 / STEPS)


def diffrax_scalar(g):
    """A scalar diffusion as the linear operator that diffrax expects."""
    import lineax

    return lineax.DiagonalLinearOperator(jnp.broadcast_to(g, (2,)))


def _diffeqsolve(term, x, start=1.0, stop=1e-3, step=-0.999 / STEPS):
    solution = diffrax.diffeqsolve(
        term,
        diffrax.Euler(),
        start,
        stop,
        step,
        x,
        adjoint=diffrax.ForwardMode(),
        max_steps=STEPS + 1,
    )
    return solution.ys[0]


def main(peers: str | None = None) -> dict:
    """Measure, save and print."""
    uniform = diffjax.grids.uniform(PROCESS, STEPS, stop=1e-3)
    runs = {
        "hand-written scan (DDIM)": hand_written,
        "diffjax ddim": diffjax_sample(diffjax.solvers.ddim()),
        "diffjax dpmpp": diffjax_sample(diffjax.solvers.dpmpp()),
        "diffjax euler": lambda key: diffjax.sample(key, MIXTURE, diffjax.solvers.euler(), uniform, shape=(2,)).x,
        "diffrax Euler": diffrax_euler,
        "diffjax euler_maruyama": lambda key: (
            diffjax.sample(key, MIXTURE, diffjax.solvers.euler_maruyama(), uniform, shape=(2,)).x
        ),
        "diffrax Euler-Maruyama": diffrax_euler_maruyama,
    }
    measured = {}
    for batch in (1, 1024):
        keys = jax.random.split(jax.random.key(0), batch)
        compiled = {name: jax.jit(jax.vmap(run)) for name, run in runs.items()}
        contestants = {name: (lambda f=f, k=keys: f(k)) for name, f in compiled.items()}
        if batch == 1:
            contestants["diffjax ddim, eager call"] = eager
        seconds = interleaved(contestants)
        if peers is not None:
            seconds |= _peers(peers, batch)
        ours = seconds["diffjax ddim"]
        measured[f"batch {batch}"] = {
            "microseconds": {name: round(1e6 * value, 1) for name, value in seconds.items()},
            "diffjax ddim / hand-written scan": round(ours / seconds["hand-written scan (DDIM)"], 3),
            "diffjax euler / diffrax Euler": round(seconds["diffjax euler"] / seconds["diffrax Euler"], 3),
            "diffjax euler_maruyama / diffrax Euler-Maruyama": round(
                seconds["diffjax euler_maruyama"] / seconds["diffrax Euler-Maruyama"], 3
            ),
        }
        for name, value in seconds.items():
            if "PyTorch" in name:
                against = seconds["diffjax dpmpp" if "2M" in name else "diffjax ddim"]
                measured[f"batch {batch}"][f"{name} / diffjax"] = round(value / against, 2)
                call = seconds.get("diffjax ddim, eager call")
                if call and "DDIM" in name:
                    measured[f"batch {batch}"][f"{name} / diffjax eager call"] = round(value / call, 2)
    return save("oracle", measured)


def _peers(python: str, batch: int) -> dict[str, float]:
    script = Path(__file__).parent / "peers" / "oracle.py"
    output = subprocess.run(
        [python, str(script), str(batch)], capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent
    )
    return json.loads(output.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", help="a Python with torch, diffusers and k-diffusion")
    print(json.dumps(main(parser.parse_args().peers), indent=1))
