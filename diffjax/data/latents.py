"""Latents of a data set, made once by an autoencoder and kept on disk: what a latent diffusion model trains on.

A cache is a folder with `latents.npy` (a plain array, memory-mapped when read; nothing in it can be executed),
`labels.npy` and `cache.json`, which says what it is a cache of and how far it has come. It is written in chunks, each
of them finished before it is counted, so a run that is killed goes on where it was.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from diffjax.data.sets import Batch, Source, stack


class Latents:
    """Encoded images: `latents[i] -> (latent, label)`, float32 as encoded; `batches` takes it in place of images.

    Attributes:
        name, split, classes: those of the images.
        shape: of one latent.
        mean, std: of all latents, one number each; `scale` makes them 0 and 1.
        drawn: whether a mean and a standard deviation are kept for each latent, of which `batches` is to draw:
            `batches(latents, size, augment=latents.draw)`.
    """

    def __init__(self, record: dict[str, Any], values: np.ndarray, labels: np.ndarray | None):
        self.name, self.split, self.classes = record["name"], record["split"], record["classes"]
        self.drawn, self.mean, self.std = record["drawn"], record["mean"], record["std"]
        self._values, self._labels = values, labels
        self.shape: tuple[int, ...] | None = tuple(values.shape[2 if self.drawn else 1 :])

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"latents of {self.name!r}, {self.split!r}  # {len(self)} of shape {self.shape}"

    def __getitem__(self, index: int) -> tuple[np.ndarray, int | None]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, int | None]]:
        labels = self._labels
        return [(np.asarray(self._values[i]), None if labels is None else int(labels[i])) for i in indices]

    def draw(self, generator: np.random.Generator, pair: np.ndarray) -> np.ndarray:
        """A draw from the encoder's normal law: the `augment` of `batches` where `drawn`."""
        mean, std = pair
        return mean + std * generator.standard_normal(mean.shape, np.float32)

    def scale(self, image: np.ndarray) -> Float[np.ndarray, "..."]:
        """Latents with mean 0 and standard deviation 1."""
        return (np.asarray(image, np.float32) - np.float32(self.mean)) / np.float32(self.std)

    def unscale(self, x0: Any) -> Any:
        """The inverse of `scale`: what the decoder takes."""
        return x0 * self.std + self.mean

    def arrays(self) -> Batch:
        """All of them in order, for evaluation; the means where `drawn`."""
        examples = self.__getitems__(range(len(self)))
        return stack(self, [(pair[0] if self.drawn else pair, label) for pair, label in examples])


def encoded(
    images: Source,
    encode: Callable[[Any], Any],
    folder: str | os.PathLike,
    *,
    version: Any = "",
    size: int = 256,
    progress: bool = True,
) -> Latents:
    """The latents of a whole split, from `folder` where they are, else made and kept there.

    Args:
        images: a split, from `load`.
        encode: an autoencoder's first half, `encode(x0) -> latents` of a batch in [-1, 1], (B, H, W, C) to (B, ...);
            or `-> (mean, std)`, to draw latents anew every time. Best compiled: `jax.jit(...)`.
        folder: of this cache alone.
        version: what else the latents depend on: the encoder's parameters (any tree of arrays, of which a digest is
            kept) or a string. A cache of another version is refused, not used.
        size: images a batch; the last one is filled up, so that one program serves all.
        progress: a bar with the time left.

    Raises:
        ValueError: the folder holds a cache of something else; latents that are not finite, or too few.
    """
    folder, count = Path(folder), len(images)
    if size < 1 or count < 1:
        raise ValueError(f"needs size >= 1 and images, got size={size!r} and {count} images")
    labelled = images.classes is not None
    wanted = {"name": images.name, "split": images.split, "count": count, "classes": images.classes}
    wanted |= {"version": version if isinstance(version, str) else digest(version)}
    record = _opened(folder, wanted)
    done = record.get("done", 0)
    starts = range(done, count, size)
    values = labels = None
    for start in tqdm(starts, desc="encoding", unit="batch", disable=not progress or not starts):
        batch, labels_read = _read(images, start, min(start + size, count), size)
        latents, drawn = _encoded(encode, batch)
        if values is None or labels is None:
            folder.mkdir(parents=True, exist_ok=True)
            values = _array(folder / "latents.npy", (count, *latents.shape[1:]), np.float32, done)
            labels = _array(folder / "labels.npy", (count,), np.int32, done)
            record |= wanted | {"drawn": drawn}
        stop = min(start + size, count)
        values[start:stop] = latents[: stop - start]
        labels[start:stop] = -1 if labels_read is None else labels_read
        values.flush()
        labels.flush()
        record |= {"done": stop, **_added(record, latents[: stop - start], drawn)}
        if stop == count:
            mean = record["sum"] / record["numbers"]
            record |= {"mean": mean, "std": max(record["squares"] / record["numbers"] - mean**2, 1e-12) ** 0.5}
        _write(folder / "cache.json", record)
    found = np.load(folder / "latents.npy", mmap_mode="r", allow_pickle=False)
    kept = np.load(folder / "labels.npy", mmap_mode="r", allow_pickle=False) if labelled else None
    return Latents(record, found, kept)


def digest(tree: Any) -> str:
    """A fingerprint of a tree of arrays: of its structure, shapes, types and bytes."""
    leaves, structure = jax.tree.flatten(tree)
    found = hashlib.sha256(str(structure).encode())
    for leaf in map(np.asarray, leaves):
        found.update(f"{leaf.shape}{leaf.dtype}".encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def _opened(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What is known of a cache, empty where there is none."""
    file = folder / "cache.json"
    if not file.exists():
        return {}
    try:
        record = json.loads(file.read_text())
    except ValueError:
        raise ValueError(f"{file} is not the record of a cache of latents: delete the folder to make it anew") from None
    differ = {name: (record.get(name), value) for name, value in wanted.items() if record.get(name) != value}
    if differ:
        shown = ", ".join(f"{name} is {found!r}, expected {value!r}" for name, (found, value) in differ.items())
        raise ValueError(f"the cache in {folder} is of something else: {shown}; delete it or give another folder")
    return record


def _read(images: Source, start: int, stop: int, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    batch = stack(images, images.__getitems__(range(start, stop)))
    missing = size - (stop - start)
    pixels = np.concatenate([batch.x0, np.repeat(batch.x0[-1:], missing, axis=0)]) if missing else batch.x0
    return pixels, batch.condition


def _encoded(encode: Callable, batch: np.ndarray) -> tuple[np.ndarray, bool]:
    found = encode(batch)
    drawn = isinstance(found, tuple)
    parts = [np.asarray(part, np.float32) for part in (found if drawn else (found,))]
    if len(parts) not in (1, 2) or any(len(part) != len(batch) for part in parts):
        shapes = [part.shape for part in parts]
        raise ValueError(f"encode must give latents or (mean, std) with a leading axis of {len(batch)}, got {shapes}")
    if not all(np.all(np.isfinite(part)) for part in parts):
        raise ValueError("encode gave latents that are not finite; nothing of this batch was kept")
    return (np.stack(parts, axis=1) if drawn else parts[0]), drawn


def _array(file: Path, shape: tuple[int, ...], dtype: Any, done: int) -> np.memmap:
    if done:
        found = np.lib.format.open_memmap(file, mode="r+")
        if found.shape != shape or found.dtype != dtype:
            raise ValueError(f"{file} has shape {found.shape}, expected {shape}: delete the folder to make it anew")
        return found
    return np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)


def _added(record: dict[str, Any], latents: np.ndarray, drawn: bool) -> dict[str, Any]:
    """The sums that the mean and the variance of all latents are made of; of what is drawn: variances of both kinds."""
    wide = latents.astype(np.float64)
    total = wide[:, 0] if drawn else wide
    squares = float(np.sum(total**2)) + (float(np.sum(wide[:, 1] ** 2)) if drawn else 0.0)
    found = {"sum": float(np.sum(total)), "squares": squares, "numbers": total.size}
    return {name: record.get(name, 0) + number for name, number in found.items()}


def _write(file: Path, record: dict[str, Any]) -> None:
    draft = file.with_suffix(".tmp")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.replace(file)
