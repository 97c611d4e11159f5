"""Data: image sets by name through TFDS and grain, and toy sets as pure functions of a key."""

from diffjax.data import augment, toy
from diffjax.data.latents import Latents, encoded
from diffjax.data.pipeline import Checkpointable, batches
from diffjax.data.sets import Batch, Images, Source, load

__all__ = [
    "Batch",
    "Checkpointable",
    "Images",
    "Latents",
    "Source",
    "augment",
    "batches",
    "encoded",
    "load",
    "toy",
]
