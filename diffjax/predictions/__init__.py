"""What a network predicts, and how that becomes the clean estimate."""

from diffjax.predictions.prediction import Denoiser, Prediction
from diffjax.predictions.targets import data, edm, flow, noise, score, velocity
from diffjax.predictions.variance import learned_range

__all__ = ["Denoiser", "Prediction", "data", "edm", "flow", "learned_range", "noise", "score", "velocity"]
