"""Data: the digits' fixed split, the global order, shards, exact resume, augmentation, toy sets."""

import json

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffjax import data
from diffjax.data import toy
from diffjax.data.digits import split


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def train(folder):
    return data.load("digits", "train", folder=folder)


def numbered(count):
    """A stand-in split whose image i is the number i, for tests of the order."""

    class Numbered(data.Images):
        def __init__(self):
            self.name, self.split, self.shape, self.classes = "numbers", "train", (1, 1, 1), None
            self.maximum = 2

        def __len__(self):
            return count

        def __getitems__(self, indices):
            return [(np.full((1, 1, 1), i), int(i)) for i in indices]

    return Numbered()


def numbers(iterator, count):
    return [next(iterator).condition.tolist() for _ in range(count)]


def test_digits_are_those_of_scikit_learn_split_in_two(folder, train):
    test = data.load("digits", "test", folder=folder)
    assert (len(train), len(test)) == (1500, 297)
    assert train.shape == (8, 8, 1) and train.classes == 10
    everything = load_digits()
    parts = [part.arrays() for part in (train, test)]
    for part in parts:
        assert part.x0.dtype == np.float32 and part.x0.shape[1:] == (8, 8, 1)
        assert part.x0.min() == -1 and part.x0.max() == 1
    found = np.concatenate([part.x0.reshape(-1, 64) for part in parts])
    labels = np.concatenate([part.condition for part in parts])
    expected = np.column_stack([everything.data / 8 - 1, everything.target])
    found = np.column_stack([found, labels])
    # The same 1,797 rows, each once.
    np.testing.assert_array_equal(expected[np.lexsort(expected.T)], found[np.lexsort(found.T)].astype(np.float64))


def test_split_is_stratified_and_spread():
    labels = load_digits().target
    indices = split(labels)
    assert len(indices["test"]) == 297 and not set(indices["test"]) & set(indices["train"])
    counts, held = np.bincount(labels), np.bincount(labels[indices["test"]])
    assert np.all(np.abs(held - counts * 297 / 1797) <= 0.5)
    for label in range(10):
        members = np.flatnonzero(labels == label)
        places = np.searchsorted(members, np.intersect1d(members, indices["test"]))
        assert set(np.diff(places)) <= {5, 6, 7}


def test_loading_again_reads_the_same_files(folder, train):
    again = data.load("digits", "train", folder=folder)
    np.testing.assert_array_equal(again.arrays().x0, train.arrays().x0)
    part = data.load("digits", "train[:10%]", folder=folder)
    assert len(part) == 150
    image, label = train[3]
    np.testing.assert_array_equal(train.scale(image), train.arrays().x0[3])
    assert label == train.arrays().condition[3]


def test_digits_need_no_tensorflow(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from diffjax import data\n"
        f"images = data.load('digits', 'train', folder={str(tmp_path)!r})\n"
        "assert next(data.batches(images, 8)).x0.shape == (8, 8, 8, 1)\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_epoch_is_a_new_permutation():
    order = np.concatenate(numbers(data.batches(numbered(12), 4, seed=3), 6)).reshape(2, 12)
    for epoch in order:
        assert sorted(epoch) == list(range(12))
    assert not np.array_equal(order[0], order[1])
    assert not np.array_equal(order[0], np.arange(12))


def test_shuffling_is_determined_by_the_seed():
    a, b, c = (numbers(data.batches(numbered(20), 5, seed=s), 8) for s in (3, 3, 4))
    assert a == b != c
    plain = numbers(data.batches(numbered(6), 4, shuffle=False), 3)
    assert plain == [[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]]


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_share_out_the_very_batches_of_one(hosts):
    # 20 images, batches of 6: the third batch runs across the end of the epoch.
    one = numbers(data.batches(numbered(20), 6), 7)
    parts = [numbers(data.batches(numbered(20), 6, shard_index=h, shard_count=hosts), 7) for h in range(hosts)]
    for k, batch in enumerate(one):
        assert [number for part in parts for number in part[k]] == batch


def test_one_epoch_covers_every_image_once():
    iterator = data.batches(numbered(10), 4, repeat=False)
    batches = [batch.condition.tolist() for batch in iterator]
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(number for batch in batches for number in batch) == list(range(10))
    parts = [
        [b.condition for b in data.batches(numbered(10), 4, repeat=False, shard_index=h, shard_count=2)] for h in (0, 1)
    ]
    first, second = (np.concatenate(part).tolist() for part in parts)
    assert not set(first) & set(second) and sorted(first + second) == list(range(10))


@pytest.mark.parametrize("threads", [0, 2])
def test_state_round_trip_gives_the_same_batches_mid_epoch(train, threads):
    def flip(generator, image):
        return image[:, :: generator.choice([-1, 1])]

    def start():
        return data.batches(train, 64, seed=5, augment=flip, threads=threads)

    iterator = start()
    for _ in range(30):  # 1500 / 64 = 23.4: into the second epoch
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(5)]
    fresh = start()
    fresh.set_state(state)
    for batch in expected:
        again = next(fresh)
        np.testing.assert_array_equal(again.x0, batch.x0)
        np.testing.assert_array_equal(again.condition, batch.condition)
    assert not np.array_equal(expected[0].x0, expected[1].x0)


def test_augmentation_depends_on_the_position_alone():
    def note(generator, image):
        return image * 0 + generator.integers(1 << 30)

    def draws(**shard):
        return next(data.batches(numbered(8), 8, augment=note, **shard)).x0.ravel()

    whole = draws()
    assert len(set(whole.tolist())) == 8
    halves = [draws(shard_index=h, shard_count=2) for h in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(halves), whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be a positive"),
        ({"size": 5, "shard_count": 2}, "divisible by shard_count=2"),
        ({"size": 4, "shard_index": 2, "shard_count": 2}, "below shard_count=2"),
        ({"size": 4, "shard_count": 4, "repeat": False}, "different sizes"),
    ],
)
def test_bad_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.batches(numbered(10), **arguments)


def test_images_of_different_shapes_ask_for_an_augmentation():
    images = numbered(4)
    images.__class__.__getitems__ = lambda self, ids: [(np.zeros((i + 1, 2, 1)), 0) for i in ids]
    with pytest.raises(ValueError, match="crops or resizes"):
        next(data.batches(images, 2, threads=0))
    crop = data.batches(images, 2, threads=0, augment=lambda generator, image: image[:1])
    assert next(crop).x0.shape == (2, 1, 2, 1)


def test_unknown_names_are_refused(folder):
    with pytest.raises(ValueError, match=r"'digit' is unknown.*'digits'"):
        data.load("digit", folder=folder)
    with pytest.raises(ValueError, match=r"no split 'valid'.*'test', 'train'"):
        data.load("digits", "valid", folder=folder)


def test_a_set_that_cannot_be_prepared_says_what_to_do(folder, monkeypatch):
    import tensorflow_datasets as tfds

    def offline(self, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    with pytest.raises(RuntimeError, match=r"'mnist' is not prepared.*no route.*tfds build mnist"):
        data.load("mnist", folder=folder)


TOYS = {
    "moons": (toy.moons, 2),
    "checkerboard": (toy.checkerboard, 2),
    "swiss_roll": (toy.swiss_roll, 3),
    "mixture": (toy.mixture, 8),
}


@pytest.mark.parametrize("name", TOYS)
def test_toy_sets_are_standardised_and_labelled(name):
    draw, classes = TOYS[name]
    x, label = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 20000))
    assert x.shape == (20000, 2) and x.dtype == np.float32
    np.testing.assert_allclose(x.mean(0), 0, atol=0.04)
    np.testing.assert_allclose(x.std(0), 1, atol=0.04)
    np.testing.assert_allclose(np.bincount(label) / 20000, 1 / classes, atol=0.02)


def test_toy_sets_lie_where_they_should():
    keys = jax.random.split(jax.random.key(1), 4000)
    x, label = jax.vmap(toy.checkerboard)(keys)
    column, row = np.floor((np.asarray(x).T / 12**0.5 + 0.5) * 4).astype(int)
    assert np.all((column + row) % 2 == 0)
    np.testing.assert_array_equal(row % 2, label)

    x, label = jax.vmap(lambda key: toy.moons(key, 0.0))(keys)
    circle = np.asarray(x) * [0.87, 0.5] + [0.5, 0.25] - np.outer(label, [1, 0.5])
    np.testing.assert_allclose(np.hypot(*circle.T), 1, atol=1e-5)
    assert np.all((circle[:, 1] >= -1e-6) == (label == 0))

    x, label = jax.vmap(toy.mixture)(keys)
    centre = 1.4 * np.exp(2j * np.pi * np.asarray(label) / 8)
    error = np.asarray(x) - np.stack([centre.real, centre.imag], 1)
    np.testing.assert_allclose(error.std(0), 0.15, rtol=0.05)


def test_toy_stream_resumes():
    stream = toy.stream(toy.moons, jax.random.key(0), 16)
    first = next(stream)
    state = stream.get_state()
    second = next(stream)
    fresh = toy.stream(toy.moons, jax.random.key(0), 16)
    fresh.set_state(json.loads(json.dumps(state)))
    np.testing.assert_array_equal(next(fresh).x0, second.x0)
    assert not np.array_equal(first.x0, second.x0)
    with pytest.raises(ValueError, match="size must be at least 1"):
        toy.stream(toy.moons, jax.random.key(0), 0)
