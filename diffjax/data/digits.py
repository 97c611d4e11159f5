"""The 1,797 handwritten digits that scikit-learn ships, as a TFDS data set.

Images are 8 x 8 x 1 with integer values 0 to 16, ten classes (the test part of the UCI optical recognition set).
Nothing is downloaded and TensorFlow is not needed: the features are plain tensors in array_record files.

The split is fixed: 1,500 to train on and 297 held out, stratified (each class holds out its share of the 297,
to the nearest image) and evenly spaced in the order of the file. That order runs through the thirteen writers one
after the other, so every writer is on both sides, and no random generator's version can change who is where.
"""

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

MAXIMUM = 16
HELD_OUT = 297


def split(labels: Int[np.ndarray, " n"], held_out: int = HELD_OUT) -> dict[str, list[int]]:
    """Indices of the "train" and "test" images, in the order of the file."""
    test: list[int] = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        share = round(len(members) * held_out / len(labels))
        test.extend(members[(2 * np.arange(share) + 1) * len(members) // (2 * share)].tolist())
    test.sort()
    return {"train": sorted(set(range(len(labels))) - set(test)), "test": test}


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder of scikit-learn's digits: features `image` (8, 8, 1) uint8 and `label` int64."""

    name = "digits"
    VERSION = tfds.core.Version("1.0.0")
    # Nothing is downloaded. (Where TFDS would look for checksums, it imports an undeclared package.)
    url_infos = None

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of scikit-learn, values 0 to 16.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager):
        del dl_manager
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
        return {name: self._generate_examples(images, labels, indices) for name, indices in split(labels).items()}

    def _generate_examples(self, images, labels, indices):
        for i in indices:
            yield i, {"image": images[i], "label": int(labels[i])}
