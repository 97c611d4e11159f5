"""Operators of inverse problems: adjoints against two independent transposes, spectra against dense decompositions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import guidance, inverse, oracles, processes
from diffjax.inverse.operators import as_matrix, cospectral, log_determinant, shapes, squared_values

RNG = np.random.default_rng(0)
KEEP = RNG.random((4, 6)) < 0.5
LINEAR = {
    "identity": lambda: inverse.identity((3, 2)),
    "diagonal": lambda: inverse.diagonal({"a": RNG.normal(size=3), "b": np.array([0.0, 2.0])}),
    "mask": lambda: inverse.mask({"a": np.array([True, False, True]), "b": KEEP}),
    "matrix": lambda: inverse.matrix(RNG.normal(size=(3, 6)), (2, 3)),
    "tall matrix": lambda: inverse.matrix(RNG.normal(size=(7, 4)) * np.array([1.0, 0, 1, 1])),
    "compressed_sensing": lambda: inverse.compressed_sensing(jax.random.key(1), 5, (3, 4)),
    "blur": lambda: inverse.blur(RNG.normal(size=(3, 4)), (4, 6)),
    "blur of channels": lambda: inverse.blur(inverse.gaussian_kernel(3, 0.8, 1), (5, 2)),
    "downsample": lambda: inverse.downsample(2, (4, 6, 2)),
    "colourisation": lambda: inverse.colourisation((2, 3, 3), np.array([0.3, 0.6, 0.1])),
    "radon": lambda: inverse.radon(np.array([0.0, 0.7, 2.0]), (4, 5)),
    "a narrow radon": lambda: inverse.radon(np.array([0.3]), (4, 5), detectors=3),
    "fourier": lambda: inverse.fourier(KEEP),
    "fourier of channels": lambda: inverse.fourier(KEEP[0], (6, 2)),
    "linear": lambda: inverse.linear(lambda x: {"d": x[1:] - 2 * x[:-1]}, (5,)),
    "decomposed": lambda: inverse.decomposed(inverse.radon(np.array([0.0, 1.0]), (3, 3))),
}
FACTORIES = {
    "blur", "colourisation", "compressed_sensing", "decomposed", "diagonal", "downsample", "fourier", "identity",
    "linear", "mask", "matrix", "radon",
}  # fmt: skip


def draw(shape, seed):
    known = shapes(shape)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(known.structure, [rng.normal(size=size) for size in known.sizes])


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(tree)])


@pytest.fixture(scope="module")
def operators():
    return {name: build() for name, build in LINEAR.items()}


def test_every_linear_operator_is_here(operators):
    """What the package has with an adjoint is tested below."""
    from diffjax.catalogue import catalogue

    offered = {n for n, f in catalogue(inverse).items() if f.__module__.endswith(("operators", "images"))}
    assert offered - {"gaussian_kernel", "pseudo_inverse"} == FACTORIES


@pytest.mark.parametrize("name", LINEAR)
def test_adjoint_spectrum_and_shapes(name, operators, x64):
    """<A x, y> = <x, A^T y>, autodiff's transpose, and functions of A^T A and A A^T of the dense matrix."""
    a = operators[name]
    x, y = draw(a.input_shape, 1), draw(a.output_shape, 2)

    @jax.jit
    def everything(a, x, y):
        out = {"seen": a(x), "back": a.adjoint(y), "transposed": jax.linear_transpose(a, x)(y)[0]}
        out["dense"] = as_matrix(a, jnp.float64)
        if hasattr(a, "spectral"):
            f = lambda q: 1 / (0.3 + q)
            out |= {"normal": a.spectral(f, x), "outer": cospectral(a, f, y), "pinv": inverse.pseudo_inverse(a, y)}
            out["logdet"] = log_determinant(a, lambda q: 0.3 + q, x)
        return out

    out = everything(a, x, y)
    assert jax.tree.map(jnp.shape, out["seen"]) == jax.tree.map(np.shape, y)
    assert jax.tree.map(jnp.shape, out["back"]) == jax.tree.map(np.shape, x)
    x, y, dense = flat(x), flat(y), np.asarray(out.pop("dense"))
    out = {name: flat(leaf) for name, leaf in out.items()}
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    close(out["seen"] @ y, x @ out["back"])
    close(out["transposed"], out["back"])
    close(dense @ x, out["seen"])
    if "normal" in out:
        close(out["normal"], np.linalg.solve(0.3 * np.eye(dense.shape[1]) + dense.T @ dense, x))
        outer = 0.3 * np.eye(dense.shape[0]) + dense @ dense.T
        close(out["outer"], np.linalg.solve(outer, y))
        close(out["logdet"], np.linalg.slogdet(outer)[1])
        close(out["pinv"], np.linalg.pinv(dense, rcond=1e-10) @ y)


def even(transfer):
    """The symmetric kernel whose Fourier transform is ``transfer``, frequencies 0 to n / 2 of n entries."""
    full = np.concatenate([transfer, transfer[-2:0:-1]])
    return np.roll(np.real(np.fft.ifft(full)), len(full) // 2)


SMALL = np.array([1.0, 0.5, 0.3, 2e-2, 2e-3, 1e-4, 1e-6, 1e-9, 0.0])  # singular values that few bits can tell from 0


@pytest.mark.parametrize("name", ["blur", "matrix", "traced matrix", "diagonal", "slices"])
@pytest.mark.parametrize("bits", [32, 64])
def test_which_singular_values_count(name, bits, x64):
    """The same in every operator: A^+ A is 1 above four roundings and 0 below, and A A^+ A = A within their root."""
    del x64
    dtype, size = {32: np.float32, 64: np.float64}[bits], 16
    kernel = even(SMALL)
    dense = as_matrix(inverse.blur(kernel, (size,)))
    a = {
        "blur": lambda: inverse.blur(kernel, (size,)),
        "matrix": lambda: inverse.matrix(dense),
        "traced matrix": lambda: jax.jit(inverse.matrix)(dense.astype(dtype)),
        "diagonal": lambda: inverse.diagonal({"a": SMALL[:3], "b": SMALL[3:]}),
        "slices": lambda: inverse.slicewise(inverse.blur(kernel, (size,)), 1),
    }[name]()
    frequencies = np.arange(len(SMALL))
    if name == "diagonal":
        basis = [{"a": e[:3], "b": e[3:]} for e in np.eye(len(SMALL), dtype=dtype)]
    else:
        waves = np.cos(2 * np.pi * np.outer(frequencies, np.arange(size)) / size)
        waves = (waves / np.linalg.norm(waves, axis=1, keepdims=True)).astype(dtype)
        basis = list(waves[:, None] if name == "slices" else waves)
    root = np.sqrt(4 * np.finfo(dtype).eps)
    apart = 20 * np.finfo(dtype).eps / SMALL[root < SMALL].min()  # how well singular vectors of the two kinds are known
    project = jax.jit(lambda x: a.spectral(lambda q: jnp.where(q > 0, 1.0, 0.0).astype(q.dtype), x))
    again = jax.jit(lambda x: a(inverse.pseudo_inverse(a, a(x))))
    for value, wave in zip(SMALL, basis, strict=True):
        np.testing.assert_allclose(flat(project(wave)), (value > root) * flat(wave), atol=apart)
        np.testing.assert_allclose(flat(again(wave)), flat(a(wave)), atol=root)
    count = np.sum((SMALL if name == "diagonal" else np.linalg.svd(dense)[1]) > root)
    assert np.count_nonzero(squared_values(a, np.zeros(1, dtype))) == count
    total = float(log_determinant(a, lambda q: jnp.where(q > 0, jnp.e, 1.0).astype(q.dtype), basis[0]))
    assert abs(total - count) < 1e-4 * count
    seen = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, dtype), a(basis[0]))
    assert np.abs(flat(inverse.pseudo_inverse(a, seen))).max() < 4 / root  # no rounding is divided by less


@pytest.mark.parametrize("dtype", [bool, int, np.float16])
def test_weights_that_are_masks(dtype):
    """0 and 1 of any type, traced or not, are the weights 0.0 and 1.0."""
    keep, y, level = np.array([1, 0, 1]), np.array([0.3, 0.0, -1.0], np.float32), processes.vp().level(0.4)

    def value(weights):
        twist = inverse.pigdm(inverse.measurement(inverse.diagonal(weights), y, 0.2), 0.7)
        return guidance.tilted(oracles.gaussian(np.ones(3, np.float32), 0.7), twist)(y + 1, level), twist.measurement

    wanted, _ = value(keep.astype(np.float32))
    found, seen = value(keep.astype(dtype))
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(jax.jit(lambda w: value(w)[0])(keep.astype(dtype)), wanted, rtol=1e-6)
    assert seen.operator.squared.dtype == jnp.float32
    np.testing.assert_array_equal(inverse.pseudo_inverse(seen.operator, jnp.array([2, 0, 3])), [2.0, 0.0, 3.0])


def test_a_frequency_that_does_not_pass():
    """Means of neighbours of 8 entries kill (1, -1, ..): a float64 transform has 1e-17 there, whose square is not 0."""
    a = inverse.blur(np.array([0.5, 0.5]), (8,))
    alternating = jnp.array([1.0, -1.0] * 4)
    found = inverse.pseudo_inverse(a, a(jnp.arange(8.0)) + 0.1 * alternating)
    centred = np.arange(8.0) - alternating * np.mean(alternating * np.arange(8.0))
    np.testing.assert_allclose(found, centred, atol=1e-5)


def test_cutoff():
    """What is cut is cut of A, alike in a blur and a matrix: A A^+ A = A to rounding, and noise over 0.03 at most."""
    kernel, shape = inverse.gaussian_kernel(5, 1.0), (8, 8)
    whole, a = inverse.blur(kernel, shape), inverse.blur(kernel, shape, cutoff=0.03)
    dense, full = as_matrix(a), as_matrix(whole)
    np.testing.assert_allclose(inverse.decomposed(whole, cutoff=0.03).entries, dense, atol=1e-14)
    u, s, vt = np.linalg.svd(full)
    np.testing.assert_allclose((u * np.where(s > 0.03, s, 0)) @ vt, dense, atol=1e-14)
    traced = jax.jit(lambda k: as_matrix(inverse.blur(k, shape, cutoff=0.03)))(kernel)
    np.testing.assert_allclose(traced, dense, atol=1e-6)
    x, y = np.asarray(np.random.default_rng(3).normal(size=(2, *shape)), np.float32)
    np.testing.assert_allclose(a(inverse.pseudo_inverse(a, a(x))), a(x), atol=2e-5)  # 7 roundings / 0.03
    inverted, exact = inverse.pseudo_inverse(a, y), np.linalg.pinv(dense, rcond=1e-6) @ y.ravel()
    np.testing.assert_allclose(inverted, exact.reshape(shape), atol=1e-3)  # 8 roundings / 0.03^2
    assert np.linalg.norm(inverted) < np.linalg.norm(y) / 0.03
    assert np.linalg.norm(inverse.pseudo_inverse(whole, y)) > 5 * np.linalg.norm(y) / 0.03


def test_closed_forms():
    """A convolution against SciPy's, total mass of projections, block means, one Fourier coefficient."""
    from scipy.ndimage import convolve

    x = np.asarray(RNG.normal(size=(5, 7)), np.float32)
    kernel = RNG.normal(size=(3, 3))
    np.testing.assert_allclose(inverse.blur(kernel, (5, 7))(x), convolve(x, kernel, mode="wrap"), atol=2e-5)
    projections = inverse.radon(np.linspace(0, 3, 5), (5, 7))(x)
    np.testing.assert_allclose(projections.sum(1), np.full(5, x.sum()), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(projections[0, 2 : 2 + 7], x.sum(0), atol=1e-5)  # angle 0: columns, 11 detectors
    np.testing.assert_allclose(inverse.downsample(2, (4, 2))(x[:4, :2])[1, 0], x[2:4, :2].mean(), rtol=1e-5)
    keep = np.zeros((5, 7), bool)
    keep[0, 0] = True
    np.testing.assert_allclose(inverse.fourier(keep)(x), [[x.sum() / 35**0.5], [0]], atol=1e-5)


def test_nonlinear_operators():
    """Their ambiguities, ranges and identities."""
    x = jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32)
    phase = inverse.phase_retrieval((8, 8))
    assert phase.output_shape == (16, 16)
    np.testing.assert_allclose(phase(-x), phase(x), atol=1e-5)
    np.testing.assert_allclose(phase(x[::-1, ::-1]), phase(x), atol=1e-4)
    np.testing.assert_allclose(jnp.sum(phase(x) ** 2), jnp.sum(x**2), rtol=1e-5)
    np.testing.assert_array_equal(inverse.hdr((8, 8))(x), np.clip(2 * x, -1, 1))
    np.testing.assert_allclose(inverse.saturation((8, 8), 0.01)(x), x, atol=1e-3)
    coarse = inverse.jpeg((8, 8), 0.5)
    np.testing.assert_allclose(coarse(coarse(x)), coarse(x), atol=1e-5)  # what is rounded stays
    np.testing.assert_allclose(inverse.jpeg((8, 8), 1e-3)(x), x, atol=0.02)
    slope = jax.grad(lambda x: coarse(x).sum())(x)
    np.testing.assert_allclose(slope, np.ones((8, 8)), atol=1e-5)  # straight through: the identity's
    assert np.all(np.isfinite(jax.grad(lambda x: phase(x).sum())(jnp.zeros((8, 8)))))


def test_noise_laws(x64):
    """log p(y | x) against SciPy, exact measurements, and the law of a draw."""
    from scipy import stats

    x0, y = jnp.array([1.0, 2.5]), np.array([1.3, 2.0])
    seen = inverse.measurement(inverse.identity((2,)), y, np.array([0.5, 2.0]))
    expected = stats.norm.logpdf(y, x0, [0.5, 2.0]).sum()
    np.testing.assert_allclose(seen.log_likelihood(x0), expected, rtol=1e-12)
    exact = inverse.measurement(inverse.identity((2,)), np.asarray(x0), 0.0)
    assert (float(exact.log_likelihood(x0)), float(exact.log_likelihood(x0 + 1e-9))) == (0.0, -np.inf)
    assert np.all(np.isfinite(jax.grad(exact.log_likelihood)(x0)))
    counts = inverse.measurement(inverse.identity((2,)), np.array([3.0, 0.0]), inverse.poisson_noise(2.0))
    expected = stats.poisson.logpmf([3, 0], 2.0 * np.asarray(x0)).sum()
    np.testing.assert_allclose(counts.log_likelihood(x0), expected, rtol=1e-12)
    np.testing.assert_allclose(counts.residual(x0), [0.5, -2.5])
    both = jax.jit(jax.vmap(lambda k: (counts.noise.draw(k, x0), seen.noise.draw(k, x0))))
    numbers, noisy = both(jax.random.split(jax.random.key(0), 4000))
    np.testing.assert_allclose(numbers.mean(0), 2.0 * x0, atol=4 * np.sqrt(5 / 4000))
    np.testing.assert_allclose(noisy.std(0), [0.5, 2.0], rtol=4 / np.sqrt(8000))


@pytest.mark.parametrize(
    "wrong, name",
    [
        (lambda: inverse.measurement(inverse.identity((3,)), np.zeros(2)), "y must have"),
        (lambda: inverse.measurement(inverse.identity((3,)), np.zeros(3), -0.1), "std"),
        (lambda: inverse.measurement(inverse.identity((3,)), np.zeros(3), np.ones(2)), "std"),
        (lambda: inverse.gaussian_noise(np.nan), "std"),
        (lambda: inverse.poisson_noise(0.0), "rate"),
        (lambda: inverse.mask(np.zeros(3, bool)), "keep"),
        (lambda: inverse.mask(np.ones(3)), "keep"),
        (lambda: inverse.matrix(np.ones((2, 3)), (4,)), "samples of shape"),
        (lambda: inverse.blur(np.ones((5, 5)), (4, 4)), "kernel"),
        (lambda: inverse.blur(np.ones((2, 2)), (4, 4), cutoff=-0.1), "cutoff"),
        (lambda: inverse.matrix(np.ones((2, 2)), cutoff=1.0), "cutoff"),
        (lambda: inverse.downsample(3, (4, 4)), "factor"),
        (lambda: inverse.colourisation((4, 3), np.ones(2)), "weights"),
        (lambda: inverse.radon(np.zeros((1, 2)), (4, 4)), "image shape"),
        (lambda: inverse.fourier(np.ones((2, 2))), "keep"),
        (lambda: inverse.compressed_sensing(jax.random.key(0), 0, (2,)), "measurements"),
        (lambda: inverse.phase_retrieval((4,), 0.5), "oversample"),
        (lambda: inverse.jpeg((7, 8)), "block"),
        (lambda: inverse.hdr((2,), -1.0), "factor"),
        (lambda: inverse.linear(lambda x: x, "abc"), "shape"),
        (lambda: inverse.decomposed(LINEAR["mask"]()), "one array"),
        (lambda: inverse.gaussian_kernel(3, 0.0), "std"),
    ],
)
def test_refusals(wrong, name):
    with pytest.raises(ValueError, match=name):
        wrong()
