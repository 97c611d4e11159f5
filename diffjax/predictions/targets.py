"""The targets that networks are trained on.

Every factory takes the process and returns a `Prediction`.  `velocity` is the v of progressive distillation
(alpha eps - sigma x_0), `flow` the velocity dx/dt of the process: for rectified flow that is eps - x_0.
"""

from __future__ import annotations

from diffjax.levels import Array, Level, Process, namespace, narrowed, static, value, widened
from diffjax.predictions.prediction import Linear, Prediction, data_coefficients, divide
from diffjax.processes.checks import positive


def noise(process: Process) -> Prediction:
    """The network predicts eps; it does not determine x_0 where alpha = 0.

    Denoising Diffusion Probabilistic Models, arXiv:2006.11239, equation 12.
    """
    return Prediction(Noise(), process)


def data(process: Process) -> Prediction:
    """The network predicts x_0; it does not determine eps where sigma = 0."""
    return Prediction(Data(), process)


def velocity(process: Process) -> Prediction:
    """The network predicts ``v = alpha eps - sigma x_0``; it determines both x_0 and eps everywhere.

    Progressive Distillation for Fast Sampling of Diffusion Models, arXiv:2202.00512, section 4.
    """
    return Prediction(Velocity(), process)


def flow(process: Process) -> Prediction:
    """The network predicts the flow velocity ``u = alpha' x_0 + sigma' eps = dx/dt`` (time from data to noise).

    Flow Matching for Generative Modeling, arXiv:2210.02747.
    """
    return Prediction(Flow(), process)


def score(process: Process) -> Prediction:
    """The network predicts ``grad log p_t(x) = -eps / sigma``; it does not determine x_0 where alpha = 0.

    Score-Based Generative Modeling through Stochastic Differential Equations, arXiv:2011.13456.
    """
    return Prediction(Score(), process)


def edm(process: Process, sigma_data: Array = 0.5, conditioning: str = "log_snr") -> Prediction:
    """EDM preconditioning, ``x_0 = c_skip x + c_out F(c_in x, c_noise)``, for any Gaussian process.

    With r^2 = alpha^2 sigma_data^2 + sigma^2: c_in = 1/r, c_skip = alpha sigma_data^2 / r^2 and
    c_out = sigma sigma_data / r.  The network is given ``c_noise = log(sigma / alpha) / 4``
    (``conditioning="log_snr"``, infinite where alpha or sigma is 0), or the process's time (``"time"``).

    Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, table 1.

    Raises ValueError unless sigma_data > 0 and conditioning is one of the two.
    """
    positive(sigma_data=sigma_data)
    if conditioning not in ("log_snr", "time"):
        raise ValueError(f"conditioning must be 'log_snr' or 'time', got {conditioning!r}.")
    return Prediction(EDM(sigma_data, conditioning), process)


def _plain_inputs(process: Process, level: Level):
    return None, process.network_time(level)


@value
class Noise:
    factory = "noise"

    def linear(self, process, level):
        _, alpha, sigma, _ = level
        one, zero = _one_zero(alpha)
        return Linear(zero, one, divide(one, alpha), -divide(sigma, alpha), zero, one)

    def inputs(self, process, level):
        return _plain_inputs(process, level)


@value
class Data:
    factory = "data"

    def linear(self, process, level):
        return data_coefficients(level)

    def inputs(self, process, level):
        return _plain_inputs(process, level)


@value
class Velocity:
    factory = "velocity"

    def linear(self, process, level):
        _, alpha, sigma, _ = level
        total = alpha**2 + sigma**2
        return Linear(-sigma, alpha, alpha / total, -sigma / total, sigma / total, alpha / total)

    def inputs(self, process, level):
        return _plain_inputs(process, level)


@value
class Flow:
    factory = "flow"

    def linear(self, process, level):
        _, alpha, sigma, _ = level
        time = widened(level)
        a = process.schedule.alpha_rate(time)
        b = process.schedule.sigma_rate(time)
        # sigma D = sigma^2 alpha' - alpha sigma sigma' stays finite where sigma' is infinite (VP at t = 0)
        variance_rate = process.schedule.variance_rate(time)
        scaled = sigma**2 * a - alpha * variance_rate
        determinant = sigma * a - alpha * b
        xp = namespace(scaled)
        steep = xp.isinf(b)
        x0_from_x = xp.where(steep, -divide(variance_rate, scaled), -divide(xp.where(steep, 0.0, b), determinant))
        x0_from_target = xp.where(steep, divide(sigma**2, scaled), divide(sigma, determinant))
        finite = xp.where(steep, 0.0, determinant)  # an infinite target determines no eps
        return Linear(a, b, x0_from_x, x0_from_target, divide(a, finite), -divide(alpha, finite))

    def inputs(self, process, level):
        return _plain_inputs(process, level)


@value
class Score:
    factory = "score"

    def linear(self, process, level):
        _, alpha, sigma, _ = level
        one, zero = _one_zero(alpha)
        return Linear(zero, -divide(one, sigma), divide(one, alpha), divide(sigma**2, alpha), zero, -sigma)

    def inputs(self, process, level):
        return _plain_inputs(process, level)


@value
class EDM:
    sigma_data: Array
    conditioning: str = static()
    factory = "edm"

    def linear(self, process, level):
        _, alpha, sigma, _ = level
        xp = namespace(alpha, self.sigma_data)
        root = xp.sqrt((alpha * self.sigma_data) ** 2 + sigma**2)
        skip = alpha * (self.sigma_data / root) ** 2
        out = sigma * self.sigma_data / root
        # F = (x_0 - skip x) / out, and 1 - alpha skip = sigma^2 / r^2
        eps_from_x = sigma / root**2
        return Linear(
            sigma / (root * self.sigma_data),
            -alpha * self.sigma_data / root,
            skip,
            out,
            eps_from_x,
            -alpha * self.sigma_data / root,
        )

    def inputs(self, process, level):
        _, alpha, sigma, _ = level
        xp = namespace(alpha, self.sigma_data)
        scale = 1 / xp.sqrt((alpha * self.sigma_data) ** 2 + sigma**2)
        if self.conditioning == "time":
            return scale, process.network_time(level)
        return scale, -0.25 * narrowed(level)


def _one_zero(like: Array) -> tuple[Array, Array]:
    xp = namespace(like)
    return xp.ones_like(like), xp.zeros_like(like)
