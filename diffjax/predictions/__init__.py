"""What a network predicts, and how that becomes the clean estimate."""

from diffjax.predictions.prediction import Denoiser, Prediction
from diffjax.predictions.targets import data, edm, flow, noise, score, velocity

__all__ = ["Denoiser", "Prediction", "data", "edm", "flow", "noise", "score", "velocity"]
