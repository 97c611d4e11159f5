"""Data: image sets by name through TFDS and grain, and toy sets as pure functions of a key."""

from diffjax.data import toy
from diffjax.data.pipeline import Checkpointable, batches
from diffjax.data.sets import Batch, Images, load

__all__ = ["Batch", "Checkpointable", "Images", "batches", "load", "toy"]
