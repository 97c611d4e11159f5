"""DPM-Solver++ multistep against its published algorithm, written out."""

from __future__ import annotations

import numpy as np

from diffjax import processes, solvers
from tests import contract
from tests.contract import MIXTURE, STARTS


def test_algorithm_2_of_the_paper():
    """x <- sigma_s / sigma_t x - alpha_s (exp(-h) - 1) D, D = (1 + 1/(2r)) x0_i - 1/(2r) x0_{i-1}, r = h_{i-1} / h_i.

    A rule with r upside down has the same order, since its errors telescope: only the numbers tell.
    """
    process, grid = processes.vp(), contract.rough(7)
    times = np.append(grid.t.time, grid.s.time[-1])
    alpha, sigma = process.level(times).alpha, process.level(times).sigma
    lambdas = np.log(alpha / sigma)
    x, previous = STARTS, None
    for i in range(7):
        h = lambdas[i + 1] - lambdas[i]
        x0 = MIXTURE(x, process.level(times[i]))
        estimate = x0
        if previous is not None:
            r = (lambdas[i] - lambdas[i - 1]) / h
            estimate = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (np.exp(-h) - 1) * estimate
        previous = x0
    np.testing.assert_allclose(contract.end(solvers.dpmpp(), MIXTURE, STARTS, grid), x, rtol=1e-10)


def test_first_order_is_ddim():
    grid = contract.rough(5)
    first = contract.end(solvers.dpmpp(1), MIXTURE, STARTS, grid)
    np.testing.assert_array_equal(first, contract.end(solvers.ddim(), MIXTURE, STARTS, grid))
