"""Batches of images: one global order, shared among hosts, that can be stopped and taken up anywhere.

Position n of the global order is an image index: the split is shuffled (anew each epoch) and
repeated without gaps, so batches run across the ends of epochs. Global batch k holds positions
k B to (k + 1) B - 1, and host h of H takes the h-th of its H equal parts. So neither the content of
a global batch nor the order in it depends on the number of hosts, and an augmentation draws from
`numpy.random.default_rng((seed, n))`, which depends on nothing but the position either.

The iterator's state is the number of the next batch: a small JSON object, exact at any batch.
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from diffjax.data.augment import Augment
from diffjax.data.sets import Batch, Source, stack


@runtime_checkable
class Checkpointable(Protocol):
    """An iterator over batches whose state can be stored as JSON and set again."""

    def __next__(self) -> Any: ...
    def __iter__(self) -> Iterator[Any]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def batches(
    images: Source,
    size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    repeat: bool = True,
    shard_index: int = 0,
    shard_count: int = 1,
    augment: Augment | None = None,
    threads: int = 2,
    prefetch: int = 8,
) -> Checkpointable:
    """An iterator over this host's part of every batch, with `get_state()` and `set_state(state)`.

    Args:
        images: a split, from `load`, or latents of one, from `encoded`.
        size: images in a *global* batch, over all hosts.
        seed: of the shuffling and the augmentation.
        shuffle: a new order every epoch; False keeps the stored one.
        repeat: endless, every batch full. False gives one epoch, whose last batch may be smaller.
        shard_index, shard_count: this host's number and the number of hosts
            (`jax.process_index()`, `jax.process_count()`).
        augment: `augment(generator, image) -> image` on one image as stored (integers, (H, W, C)); `data.augment` has
            some.
        threads: reading threads; 0 reads in the caller's.
        prefetch: batches read ahead.

    Returns:
        an iterator over `Batch(x0, condition)`: x0 (size / shard_count, H, W, C) float32 in
        [-1, 1], condition (size / shard_count,) int32 labels, or None where there are none.

    Raises:
        ValueError: sizes that do not fit.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a positive integer, got {size!r}")
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index={shard_index} must be at least 0 and below shard_count={shard_count}")
    if size % shard_count:
        raise ValueError(f"size={size} must be divisible by shard_count={shard_count}")
    if not repeat and shard_count > 1 and len(images) % shard_count:
        raise ValueError(
            f"repeat=False over shard_count={shard_count} hosts needs a number of images that it "
            f"divides, got {len(images)}: hosts would see batches of different sizes"
        )
    if len(images) == 0:
        raise ValueError(f"{images!r} is empty")

    order = grain.MapDataset.range(len(images)).seed(seed)
    order = order.shuffle() if shuffle else order
    order = order.repeat() if repeat else order
    # Only numbers so far: images are read once the host's part of a batch is known.
    numbers = order.map_with_index(lambda position, index: np.asarray([position, index]))

    def part(rows: np.ndarray) -> Batch:
        mine = np.array_split(rows, shard_count)[shard_index]
        examples = images.__getitems__(mine[:, 1].tolist())
        if augment is not None:
            examples = [
                (augment(np.random.default_rng((seed, position)), image), label)
                for position, (image, label) in zip(mine[:, 0].tolist(), examples, strict=True)
            ]
        return stack(images, examples)

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch if threads else 0)
    return iter(numbers.batch(size).map(part).to_iter_dataset(options))
