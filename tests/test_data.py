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


def test_synthetic_images_are_never_silent(folder, monkeypatch):
    import tensorflow_datasets as tfds

    def offline(self, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    with pytest.warns(UserWarning, match=r"'mnist' is not prepared.*SYNTHETIC images.*mean nothing"):
        images = data.load("mnist", folder=folder, synthetic=40)
    assert "synthetic" in images.name and "synthetic" in repr(images) and len(images) == 40
    batch = next(data.batches(images, 8, threads=0))
    assert batch.x0.shape == (8, 28, 28, 1) and np.all((batch.condition >= 0) & (batch.condition < 10))
    assert images[13][1] == 3 and images[13][0].std() > 10
    # what is there is never replaced
    assert data.load("digits", folder=folder, synthetic=40).name == "digits"


# --- augmentation ---------------------------------------------------------------------------------------------------


def test_augmentations_move_pixels_and_nothing_else():
    image = np.arange(24, dtype=np.uint8).reshape(4, 6, 1) + 1
    draw = lambda step, seed: step(np.random.default_rng(seed), image)
    flips = [draw(data.augment.flip(0.3), seed) for seed in range(400)]
    mirrored = np.mean([np.array_equal(one, image[:, ::-1]) for one in flips])
    assert all(np.array_equal(one, image) or np.array_equal(one, image[:, ::-1]) for one in flips)
    assert abs(mirrored - 0.3) < 4 * (0.21 / 400) ** 0.5
    np.testing.assert_array_equal(draw(data.augment.flip(1.0, axis=0), 0), image[::-1])
    seen = set()
    for seed in range(200):
        moved = draw(data.augment.shift(1), seed)
        assert moved.shape == image.shape and moved.dtype == np.uint8
        matches = [
            (down, right)
            for down in range(3)
            for right in range(3)
            if np.array_equal(moved, np.pad(image, ((1, 1), (1, 1), (0, 0)))[down : down + 4, right : right + 6])
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 9
    edge = draw(data.augment.shift(2, "edge"), 3)
    assert edge.min() >= 1
    windows = {draw(data.augment.crop(2, 3), seed)[0, 0, 0] for seed in range(200)}
    assert windows == set(image[:3, :4].ravel().tolist())
    np.testing.assert_array_equal(draw(data.augment.crop(2, 4, random=False), 0), image[1:3, 1:5])
    np.testing.assert_array_equal(draw(data.augment.resize(2, 3), 0)[0, 0], np.rint(image[:2, :2].mean((0, 1))))
    np.testing.assert_array_equal(draw(data.augment.resize(3, 4), 0)[:, 0, 0], image[[0, 2, 3], 0, 0])
    noisy = draw(data.augment.chain(data.augment.flip(1.0), data.augment.dequantize()), 0)
    assert noisy.dtype == np.float32 and np.all(np.abs(noisy - image[:, ::-1]) <= 0.5) and noisy.std() > 0
    for build in (
        lambda: data.augment.flip(1.1),
        lambda: data.augment.shift(-1),
        lambda: data.augment.shift(1, "wrap"),
        lambda: data.augment.crop(0, 1),
        lambda: data.augment.resize(1, 0),
        lambda: draw(data.augment.crop(5, 5), 0),
    ):
        with pytest.raises(ValueError, match=r"must be|no window"):
            build()


# --- latents ----------------------------------------------------------------------------------------------------------


def halved(x0):
    """An autoencoder's first half that has a closed form: averages of 2 x 2 blocks."""
    x0 = np.asarray(x0)
    return x0.reshape(len(x0), 4, 2, 4, 2, 1).mean((2, 4))


def test_latents_are_made_once_and_batched_like_images(train, tmp_path):
    calls = []

    def encode(x0):
        calls.append(len(x0))
        return halved(x0)

    made = lambda: data.encoded(train, encode, tmp_path / "cache", version={"w": np.ones(3)}, size=400, progress=False)
    latents = made()
    assert calls == [400] * 4 and latents.shape == (4, 4, 1) and len(latents) == 1500 and latents.classes == 10
    again = made()
    assert len(calls) == 4  # from the disk
    whole, exact = again.arrays(), halved(train.arrays().x0)
    np.testing.assert_allclose(again.unscale(whole.x0), exact, atol=1e-5)
    np.testing.assert_allclose([whole.x0.mean(), whole.x0.std()], [0, 1], atol=1e-4)
    np.testing.assert_array_equal(whole.condition, train.arrays().condition)
    options = {"seed": 3, "threads": 0}
    batch, images = (next(data.batches(source, 32, **options)) for source in (again, train))
    np.testing.assert_array_equal(batch.condition, images.condition)  # the same order
    np.testing.assert_allclose(again.unscale(batch.x0), halved(images.x0), atol=1e-5)


def test_latents_of_another_encoder_are_refused_and_a_killed_run_goes_on(train, tmp_path):
    folder, calls = tmp_path / "cache", []

    def killed(x0):
        calls.append(len(x0))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return halved(x0)

    with pytest.raises(KeyboardInterrupt):
        data.encoded(train, killed, folder, version="a", size=500, progress=False)
    with pytest.raises(ValueError, match=r"version is 'a', expected 'b'.*another folder"):
        data.encoded(train, halved, folder, version="b", size=500, progress=False)
    latents = data.encoded(train, killed, folder, version="a", size=500, progress=False)
    assert calls == [500] * 4  # the third batch alone again
    np.testing.assert_allclose(latents.unscale(latents.arrays().x0), halved(train.arrays().x0), atol=1e-5)
    (folder / "cache.json").write_text("half a rec")
    with pytest.raises(ValueError, match="delete the folder"):
        data.encoded(train, halved, folder, version="a", progress=False)
    with pytest.raises(ValueError, match="not finite"):
        data.encoded(train, lambda x0: np.nan * x0, tmp_path / "other", progress=False)
    with pytest.raises(ValueError, match="leading axis of 256"):
        data.encoded(train, lambda x0: x0[:3], tmp_path / "third", progress=False)


def test_latents_with_a_law_are_drawn_anew(train, tmp_path):
    """Mean and standard deviation are kept; draws have that law, whose variance the scale takes into account."""
    encode = lambda x0: (halved(x0), np.full((len(x0), 4, 4, 1), 0.5))
    latents = data.encoded(train, encode, tmp_path, progress=False)
    assert latents.drawn and latents.shape == (4, 4, 1)
    plain = data.batches(latents, 1500, shuffle=False, augment=latents.draw, threads=0)
    first, second = next(plain).x0, next(plain).x0
    noise = (latents.unscale(first) - halved(train.arrays().x0)) / 0.5
    assert abs(noise.mean()) < 4 / noise.size**0.5 and abs(noise.var() - 1) < 4 * (2 / noise.size) ** 0.5
    assert not np.array_equal(first, second)
    np.testing.assert_allclose([first.mean(), first.std()], [0, 1], atol=0.02)


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
