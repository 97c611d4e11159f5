"""Image data sets by name, read at random from TFDS's array_record files, without TensorFlow.

`load("digits", "train")` prepares scikit-learn's digits on the first call and opens them; any other
name is a TFDS data set ("mnist", "cifar10", ...), which is opened where it has been prepared, and
prepared where that is possible (network, and TensorFlow for encoded images).
"""

import difflib
import os
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8

# Data sets up to this many bytes of pixels are kept in memory once read.
CACHED = 1 << 28


class Batch(NamedTuple):
    """What a training step is given: images in [-1, 1] and what they are conditioned on."""

    x0: Float[np.ndarray, "batch *shape"]
    condition: Int[np.ndarray, " batch"] | None


@runtime_checkable
class Source(Protocol):
    """What `batches` reads: examples by number, and how their pixels become numbers that a network takes."""

    name: str
    split: str
    shape: tuple[int, ...] | None
    classes: int | None

    def __len__(self) -> int: ...
    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int | None]]: ...
    def scale(self, image: np.ndarray) -> np.ndarray: ...


class Images:
    """A split of a data set: `images[i] -> (image, label)`, integers as stored.

    Attributes:
        name, split: as given to `load`.
        shape: (H, W, C) of every image, or None where it varies.
        classes: number of classes, or None where there are no labels.
        maximum: the value of a white pixel (255, and 16 for the digits).
    """

    def __init__(self, name: str, split: str, records: Any, info: Any, maximum: int = 255):
        features = info.features
        self.name, self.split, self.maximum = name, split, maximum
        self._records = records
        shape = features["image"].shape
        self.shape: tuple[int, ...] | None = None if None in shape else tuple(shape)
        self.classes: int | None = features["label"].num_classes if _has_classes(features) else None
        self._cache: UInt8[np.ndarray, "n h w c"] | None = None
        if self.shape is not None and len(records) * np.prod(self.shape) <= CACHED:
            self._cache = np.zeros((len(records), *self.shape), np.uint8)
            self._labels = np.zeros(len(records), np.int32)
            self._known = np.zeros(len(records), bool)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"load({self.name!r}, {self.split!r})  # {len(self)} images {self.shape}"

    def __getitem__(self, index: int) -> tuple[UInt8[np.ndarray, "h w c"], int | None]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int | None]]:
        """Many images at once: one read of the file for all that are not in memory."""
        indices = [int(i) for i in indices]
        if self._cache is None:
            return self._read(indices)
        missing = [i for i in indices if not self._known[i]]
        for i, (image, label) in zip(missing, self._read(missing), strict=True):
            self._cache[i], self._labels[i] = image, -1 if label is None else label
            self._known[i] = True  # last: a reader in another thread sees the pixels or reads too
        labels = self._labels if self.classes is not None else None
        return [(self._cache[i], None if labels is None else int(labels[i])) for i in indices]

    def _read(self, indices: list[int]) -> list[tuple[Any, int | None]]:
        found = self._records.__getitems__(indices) if indices else []
        labels = self.classes is not None
        return [(record["image"], int(record["label"]) if labels else None) for record in found]

    def scale(self, image: np.ndarray) -> Float[np.ndarray, "..."]:
        """Stored integers as float32 in [-1, 1]."""
        return np.asarray(image, np.float32) * np.float32(2 / self.maximum) - np.float32(1)

    def arrays(self) -> Batch:
        """The whole split in its stored order, for evaluation."""
        return stack(self, self.__getitems__(range(len(self))))


def stack(images: Source, examples: Sequence[tuple[np.ndarray, int | None]]) -> Batch:
    """Examples as one scaled batch; ValueError if their shapes differ."""
    shapes = {np.shape(image) for image, _ in examples}
    if len(shapes) > 1:
        raise ValueError(
            f"images of {images.name!r} have different shapes, for example {sorted(shapes)[:3]}: "
            "give batches an `augment` that crops or resizes them to one"
        )
    labels = [label for _, label in examples]
    condition = None if None in labels else np.asarray(labels, np.int32)
    shape = (0, *(images.shape or ()))
    pixels = np.stack([image for image, _ in examples]) if examples else np.zeros(shape)
    return Batch(images.scale(pixels), condition)


def load(
    name: str, split: str = "train", *, folder: str | os.PathLike | None = None, synthetic: int | None = None
) -> Images:
    """A split of a data set, prepared if need be.

    Args:
        name: "digits", or any TFDS data set with an `image` feature ("mnist", "cifar10:3.0.2", ...).
        split: a split in TFDS's notation: "train", "test", "train[:90%]", ...
        folder: where prepared data lies; default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
        synthetic: so many made-up images of the data set's shape and classes where it is not here and cannot be
            prepared, for trying a program out. That is never silent: it warns, and the split's name says so. None
            does not.

    Raises:
        ValueError: the name or split is unknown, or the data set has no images.
        RuntimeError: the data set is known but cannot be prepared here.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    from diffjax.data.digits import MAXIMUM, Digits

    where = {} if folder is None else {"data_dir": os.fspath(folder)}
    try:
        make = Digits if name == "digits" else lambda **options: tfds.builder(name, **options)
        builder: Any = make(file_format="array_record", **where)
    except DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)  # those are listed on the network
        close = difflib.get_close_matches(name, ["digits", *known], 4, 0.5)
        raise ValueError(
            f"data set {name!r} is unknown: it must be 'digits' or a TFDS name"
            + (f"; close are {close}" if close else "")
        ) from None
    if not builder.is_prepared():
        try:
            _prepare(builder, name)
        except RuntimeError as error:
            if synthetic is None:
                raise
            warnings.warn(f"{error}. SYNTHETIC images take its place: results mean nothing", stacklevel=2)
            return made_up(name, split, builder.info.features, synthetic)
    if split.split("[")[0] not in builder.info.splits and split != "all":
        raise ValueError(f"data set {name!r} has no split {split!r}; it has {sorted(builder.info.splits)}")
    if "image" not in (builder.info.features or {}):
        raise ValueError(f"data set {name!r} has no feature 'image'; it has {sorted(builder.info.features)}")
    try:
        records = builder.as_data_source(split=split)
    except Exception as error:
        raise RuntimeError(
            f"data set {name!r} in {builder.data_dir} cannot be read: {_first_line(error)}; it must "
            "be in array_record files, `tfds build NAME --file_format=array_record` writes them"
        ) from error
    return Images(name, split, records, builder.info, MAXIMUM if name == "digits" else 255)


class _Noise:
    """Records that are drawn anew from their number: a class is a pattern of its own, with noise on it."""

    def __init__(self, shape: tuple[int, ...], classes: int | None, count: int):
        self.shape, self.classes, self.count = shape, classes, count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self._one(i) for i in indices]

    def _one(self, index: int) -> dict[str, Any]:
        label = index % (self.classes or 1)
        pattern = np.random.default_rng((1, label)).uniform(64, 192, self.shape)
        noise = np.random.default_rng((2, index)).normal(0, 24, self.shape)
        return {"image": np.clip(pattern + noise, 0, 255).astype(np.uint8), "label": label}


class _Info(NamedTuple):
    features: Any


def made_up(name: str, split: str, features: Any, count: int) -> Images:
    """`count` synthetic images with the features of a data set; its name says that they are."""
    shape = features["image"].shape
    if None in shape or count < 1:
        raise ValueError(f"synthetic images of {name!r} need a fixed shape and a positive number, got {shape}, {count}")
    classes = features["label"].num_classes if _has_classes(features) else None
    return Images(f"synthetic {name}", split, _Noise(tuple(shape), classes, count), _Info(features))


def _prepare(builder: Any, name: str) -> None:
    import tensorflow_datasets as tfds

    small = name == "digits"
    if small:
        tfds.disable_progress_bar()  # a second's work needs no five bars
    try:
        builder.download_and_prepare()
    except Exception as error:
        if builder.is_prepared():  # another process was faster
            return
        raise RuntimeError(
            f"data set {name!r} is not prepared in {builder.data_dir} and cannot be prepared here "
            f"({type(error).__name__}: {_first_line(error)}). Prepare it once on a machine with "
            f"network and TensorFlow, `tfds build {name} --file_format=array_record`, and give the "
            "folder it is written to as `folder`"
        ) from error
    finally:
        if small:
            tfds.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _has_classes(features: Any) -> bool:
    return "label" in features and getattr(features["label"], "num_classes", None) is not None
