"""Sequential Monte Carlo on the cheap problem in PyTorch: prints the median seconds of 100 steps as one JSON line.

The same operations as `benchmarks/steering.py` times in diffjax: the exact denoiser, a log-likelihood at the clean
estimate, weights, the effective size, systematic resampling when it is low, and an ancestral step.  Written as one
would: tensors over all particles, one host decision a step.  Arguments: the particles, the number of timed runs.
"""

import importlib.util
import json
import math
import statistics
import sys
import time
from pathlib import Path

import torch

_spec = importlib.util.spec_from_file_location("problem", Path(__file__).parents[1] / "problem.py")
problem = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(problem)

VALUES, VECTORS = (torch.tensor(a, dtype=torch.float32) for a in problem.eigen())
MEANS = torch.tensor(problem.MEANS)
LOG_WEIGHTS = torch.tensor(problem.WEIGHTS).log()


def denoise(x, alpha, sigma):
    """The exact posterior mean for x of shape (batch, 2)."""
    variance = alpha**2 * VALUES + sigma**2
    modes = torch.einsum("kde,bkd->bke", VECTORS, x[:, None] - alpha * MEANS)
    log_weights = LOG_WEIGHTS - 0.5 * (modes**2 / variance + variance.log()).sum(-1)
    weights = log_weights.softmax(-1)
    return weights @ MEANS + torch.einsum("bk,kde,bke->bd", weights, VECTORS, alpha * VALUES / variance * modes)


def run(levels, particles):
    """Particles, their log-weights and log Z; ``levels`` are (alpha, sigma, keep, weight, std) a step, on the host."""
    x = torch.randn(particles, 2)
    log_w, paid, log_z = torch.zeros(particles), torch.zeros(particles), 0.0
    for alpha, sigma, keep, weight, std in levels:
        x0 = denoise(x, alpha, sigma)
        log_h = -0.5 * (0.5 - x0[:, 0]) ** 2 / 0.2
        log_w, paid = log_w + log_h - paid, log_h
        w = (log_w - log_w.max()).exp()
        if w.sum() ** 2 / (w**2).sum() < 0.5 * particles:
            log_z = log_z + log_w.logsumexp(0) - math.log(particles)
            places = (torch.arange(particles) + torch.rand(())) / particles
            index = torch.searchsorted((w / w.sum()).cumsum(0), places).clamp(max=particles - 1)
            x, x0, paid, log_w = x[index], x0[index], paid[index], torch.zeros(particles)
        x = keep * x + weight * x0 + std * torch.randn(particles, 2)
    log_w = log_w - 0.5 * (0.5 - x[:, 0]) ** 2 / 0.2 - paid
    return x, log_w, log_z + log_w.logsumexp(0) - math.log(particles)


def main(particles, runs):
    """The median of the runs after one that warms up, and the mean of exp(log Z), to see that it is the same thing."""
    levels = [tuple(row) for row in json.loads(sys.stdin.read())]
    torch.set_num_threads(1)
    seconds, z = [], []
    with torch.inference_mode():
        for turn in range(runs + 1):
            start = time.perf_counter()
            z.append(float(run(levels, particles)[2].exp()))
            if turn:
                seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(seconds), "z": statistics.mean(z)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
