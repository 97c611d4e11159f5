"""The experiments run as a user runs them, in small; what they measure is measured elsewhere.

Every experiment that is found in the folder is killed, resumed and run to its end with its own ``TINY`` arguments; if
there is a function ``check_NAME(folder, result, output)`` here, it looks at what came out.
"""

import importlib
import inspect
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffjax
from diffjax import guidance, training
from diffjax.catalogue import catalogue
from diffjax.solvers import ddim
from experiments import __main__ as listing
from experiments import (
    _guided_digits,
    _inverse_choices,
    _inverse_digits,
    _inverse_methods,
    _inverse_photographs,
    _inverse_problems,
    _ising,
    _lorenz,
    _photographs,
    _run,
    _solvers,
    baselines,
    corrupted,
    digits,
    inverse,
    mixture,
    processes,
    reflection,
    solvers,
)
from experiments._marginals import gaussian_panels
from experiments._other_marginals import other_panels
from experiments._problems import moments


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [entry.name for entry in listing.entries()])
def test_every_experiment_can_be_killed_and_resumed(name, tmp_path, monkeypatch, capsys):
    """Killed when its second part is about to be made; resumed, the first is read back and the rest is made."""
    module, part, made = importlib.import_module(f"experiments.{name}"), _run.Run.part, []

    def watched(self, title, make):
        def counted():
            if len(made) == limit:
                raise Killed
            made.append(title)
            return make()

        return part(self, title, counted)

    monkeypatch.setattr(_run.Run, "part", watched)
    monkeypatch.chdir(tmp_path)  # what is not told where to go is seen
    folder, arguments, limit = tmp_path / "run", [*module.TINY, "--out", "run"], 1
    with pytest.raises(Killed):
        module.main(arguments)
    output = capsys.readouterr().out
    config = json.loads((folder / "config.json").read_text())
    assert config["experiment"] == name
    assert all(f"  {field}: " in output for field in (*config["options"], "out"))
    with pytest.raises(SystemExit, match="--resume"):
        module.main(arguments)
    first, limit = (folder / "parts" / f"{_run.slug(made[0])}.json").read_bytes(), None
    result = module.main([*arguments, "--resume"])
    assert len(made) == len(set(made))  # what was finished is not made again
    assert (folder / "parts" / f"{_run.slug(made[0])}.json").read_bytes() == first
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines if "seconds" in line and "step" not in line and "part" in line] == made
    assert lines[-1]["finished"] and any((folder / "tensorboard").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    globals().get(f"check_{name}", lambda *_: None)(folder, result, output)


def check_digits(folder, result, output):
    assert training.checkpoint.steps(folder)[-1] == 4
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert "loss" in next(line for line in lines if line.get("step") == 4)
    stored = json.loads((folder / "metrics.json").read_text())
    for name, column in stored["metrics"].items():
        assert len(column) == 7
        assert np.all(np.isfinite(list(column.values()))), name
    assert stored["solvers"]["ddim"]["nfe"] == [2, 4]
    for picture in ("samples", "denoising", "solvers"):
        assert (folder / f"{picture}.png").stat().st_size > 5000
    model = digits.load(folder)
    grid = diffjax.grids.uniform(digits.PROCESS, 2)
    assert np.all(np.isfinite(digits.generate(model, ddim(), grid, np.array([1, 2]), jax.random.key(0)).x))


def check_processes(folder, result, output):
    """The panels that were asked for, with the exact law up to what so few draws leave; four processes are possible."""
    lines = (folder / "marginals.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["panel", "flow", "linear"]
    assert all(distance < 1.95 / np.sqrt(60) for distance in result["marginals"].values())
    stored = json.loads((folder / "digits.json").read_text())
    assert set(stored["metrics"]) == {"phase", "floor"} and len(stored["metrics"]["phase"]) == 7
    assert np.all(np.isfinite(list(stored["metrics"]["phase"].values())))
    assert stored["frechet_ratio"].keys() == {"phase"} and stored["parameters"] > 1000
    for picture in ("marginals", "digits"):
        assert (folder / f"{picture}.png").stat().st_size > 5000


def test_every_process_has_a_panel():
    """Found by their packages' catalogues: a new process without one is noticed."""
    panels = [*gaussian_panels(), *other_panels()]
    shown = {panel.shows for panel in panels}
    assert len({panel.name for panel in panels}) == len(panels)
    assert set(catalogue(diffjax.processes)) <= shown
    made = lambda package: {
        name
        for name, factory in catalogue(package).items()
        if inspect.signature(factory).return_annotation in ("Process", "Interpolant", "OneSided", "AffineForward")
    }
    assert made(diffjax.phase) | made(diffjax.interpolants) <= shown
    assert {"electrostatic_noise", "blackout", "thickened", "jacobi"} <= shown
    assert set(processes.settings()) == {"vp", "flow", "blur", "phase"}


def test_sets_that_match_have_the_labels_and_are_disjoint():
    labels = np.arange(100) % 10
    real = digits.Labelled(np.arange(100.0)[:, None], labels)
    wanted = np.array([3, 0, 3, 7])
    sets = digits.matching(real, wanted)
    assert len(sets) == 5  # ten threes, two at a time
    assert all(np.array_equal(each.labels, wanted) for each in sets)
    assert len(np.unique([each.images for each in sets])) == 20


def check_mixture(folder, result, output):
    """The order of the solvers."""
    header, *rows = [line.split(",") for line in (folder / "mixture.csv").read_text().splitlines()]
    assert header[-1] == "NFE 64" and [row[0] for row in rows] == ["ddim", "dpmpp", "ancestral"]
    errors = {row[0]: np.array(row[5:], float) for row in rows}
    assert 1.3 < errors["ddim"][1] / errors["ddim"][2] < 3
    assert 3 < errors["dpmpp"][1] / errors["dpmpp"][2] < 6
    assert (folder / "mixture.png").stat().st_size > 5000


def test_padded_plans_change_nothing(x64):
    process, denoise, key = diffjax.processes.flow(), mixture.data(), jax.random.key(0)
    for name in ("dpmpp", "heun", "ancestral"):
        solver = getattr(diffjax.solvers, name)()
        grid = diffjax.grids.uniform(process, 5)
        plain, padded = (
            diffjax.sample(key, denoise, each, grid, shape=(2,), dtype=float)
            for each in (solver, _solvers.padded(solver, 9))
        )
        np.testing.assert_allclose(padded.x, plain.x, rtol=1e-12)
    with pytest.raises(ValueError, match="rows must be at least"):
        _solvers.padded(solver, 3).plan(grid)


def test_grids_are_as_long_as_the_evaluations_allow():
    spacing = lambda steps: diffjax.grids.uniform(diffjax.processes.flow(), steps)
    found = _solvers.grids(diffjax.solvers.heun(), spacing, (3, 4, 9))
    assert {nfe: len(grid) for nfe, grid in found.items()} == {4: 2, 9: 4}  # two evaluations a step


def test_the_exact_flow_is_that_of_a_gaussian(x64):
    process = diffjax.processes.flow()
    grid = diffjax.grids.uniform(process, 4)
    denoise = diffjax.oracles.mixture([1.0], [[1.0, -2.0]], [[[0.3, 0.1], [0.1, 0.2]]])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
    root = np.linalg.cholesky(np.array([[0.3, 0.1], [0.1, 0.2]]))
    values, vectors = np.linalg.eigh(root @ root.T)
    expected = np.array([1.0, -2.0]) + x @ (vectors * np.sqrt(values) @ vectors.T)
    np.testing.assert_allclose(mixture.exact_flow(denoise, process, grid, x), expected, atol=1e-9)


def test_every_experiment_is_listed_with_its_run_time(capsys):
    listing.main()
    found = {entry.name: entry for entry in listing.entries()}
    assert {"baselines", "digits", "mixture", "solvers"} <= set(found)
    assert all(entry.summary.endswith(".") and entry.run_time[0].isdigit() for entry in found.values())
    assert "python -m experiments.digits" in capsys.readouterr().out


def test_unknown_solvers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not public"):
        mixture.main(["--solvers", "nonsense", "--out", str(tmp_path)])


def check_solvers(folder, result, output):
    """Ranked on every exact problem."""
    header, *rows = [line.split(",") for line in (folder / "solvers.csv").read_text().splitlines()]
    assert header[-1] == "NFE 16" and len(rows) == 3 * 3
    errors = {(row[0], row[1]): np.array(row[6:], float) for row in rows}
    for problem in ("gaussian", "mixture", "edm"):
        assert errors[problem, "dpmpp"][1] < errors[problem, "ddim"][1]
        assert np.all(np.isfinite(errors[problem, "sde_dpmpp"]))
        assert (folder / f"{problem}.png").stat().st_size > 5000
    assert "| deterministic, 1 | " in (folder / "solvers.md").read_text()


def check_inverse(folder, result, output):
    """Everything is there, in range; the exact baseline fills in a box better than what was seen of it."""
    stored = json.loads((folder / "metrics.json").read_text())
    assert {group: set(each) for group, each in stored["digits"].items()} == {"linear": {"gaussian", "ddrm"}}
    for each in stored["digits"].values():
        for rows in each.values():
            for row in rows.values():
                assert (
                    row["failed"] == 0
                    and np.isfinite(row["psnr"])
                    and 0 <= row["coverage"] <= 1
                    and -1 <= row["ssim"] <= 1
                )
    assert stored["digits"]["linear"]["gaussian"]["without a box"]["psnr"] > 12
    assert set(stored["photographs"]["inpainting"]) == {"cubic interpolation", "ddrm, mixture", "ddrm, network"}
    assert stored["photographs"]["inpainting"]["cubic interpolation"]["psnr"] > 15
    assert set(stored["photographs"][_inverse_photographs.OWN]) == {"exact posterior", "ddrm"}
    assert (
        stored["pixels"] == stored["noise"] == stored["trained"] == {}
    )  # not asked for; the next test has two of them
    assert stored["intervals"]["rcps risk"] <= 1 and stored["intervals"]["k_rcps length"] >= 0
    for picture in ("digits", "methods", "calibration", "photographs", "choices"):
        assert (folder / f"{picture}.png").stat().st_size > 5000


@pytest.mark.slow
def test_choices_and_operators_that_are_not_linear(monkeypatch):
    """With the exact denoiser of a Gaussian: measured pixels become known, and what is hidden is filled in."""
    _, real, held_out = digits.held_out_digits(None)
    law = diffjax.oracles.wiener(real.images)
    monkeypatch.setattr(_inverse_digits, "prior", lambda model, params: law)
    model: Any = SimpleNamespace(params=())
    options = inverse.Options(pixels=(2, 10), draws=3, images=2)
    variances = real.images.var(0)
    s = _inverse_methods.setting(digits.PROCESS, 10, float(np.mean(variances)), 3)
    truth, key = held_out.images[:2], jax.random.key(0)
    found = _inverse_choices.chosen_pixels(options, model, truth, variances, s, key)
    for order, samples in zip(found["orders"].values(), found["samples"], strict=True):
        assert all(len(set(row)) == 10 for row in order.tolist())
        error = np.abs(samples - truth[:, None]).reshape(2, 2, 3, 64)
        for i, row in enumerate(order):
            assert np.max(error[1, i, :, row]) < 6 * 0.05 * np.sqrt(2)  # noise of the measurement and of the draw
        assert np.mean(error[1] ** 2) < np.mean(error[0] ** 2)
    filled = _inverse_choices.inpainted_by_noise(options, model, truth, s, key)
    for each in filled.values():
        error = np.square(each["samples"] - truth[:, None]).mean((0, 1))
        assert np.mean(error[_inverse_choices.HIDDEN]) < np.mean(variances[_inverse_choices.HIDDEN])
    groups = _inverse_problems.problems(truth, options.std, options.seed)
    for group in ("nonlinear", "counts"):
        samples = _inverse_digits.solved(_inverse_methods.ANY["dps"], groups[group], model, s, key)["samples"]
        assert samples.shape == (len(groups[group]), 2, 3, 8, 8, 1)
        assert np.mean((samples.mean(2) - truth) ** 2) < np.mean(variances)


def test_samples_that_are_not_finite_are_counted():
    rng = np.random.default_rng(0)
    truth = rng.uniform(-1, 1, (2, 8, 8, 1))
    samples = np.clip(truth[:, None] + 0.1 * rng.normal(size=(2, 4, 8, 8, 1)), -1, 1)
    judge: Any = lambda images: (None, images.reshape(len(images), -1)[:, :5] + 2)
    score = lambda samples: _inverse_digits.scores(samples, truth, judge, np.ones((8, 8, 1), bool))
    whole = score(samples)
    assert whole["failed"] == 0
    assert whole["psnr"] == pytest.approx(
        np.mean(-10 * np.log10(np.mean((samples.mean(1) - truth) ** 2, (1, 2, 3)) / 4))
    )
    broken = samples.copy()
    broken[0, 1:, 0, 0] = np.nan
    broken[1] = np.inf
    left = score(broken)
    assert left["failed"] == pytest.approx(7 / 8)
    assert left["psnr"] == pytest.approx(-10 * np.log10(np.mean((samples[0, 0] - truth[0]) ** 2) / 4))
    nothing = dict.fromkeys(_inverse_digits.COLUMNS) | {"failed": 1.0, "each": [None, None]}
    assert score(np.full_like(samples, np.nan)) == nothing


def test_errors_are_over_digits_and_gains_are_paired():
    rows = {
        name: {"psnr": np.mean(each), "each": each}
        for name, each in {"a": [1.0, 2.0, 6.0], "b": [3.0, 4.0, 8.0]}.items()
    }
    base = {name: {"psnr": row["psnr"] - 1, "each": [value - 1 for value in row["each"]]} for name, row in rows.items()}
    assert _inverse_digits.standard_error(rows) == pytest.approx(np.std([2, 3, 7], ddof=1) / np.sqrt(3))
    assert _inverse_digits.gain(rows, base) == pytest.approx(1.0)
    assert _inverse_digits.standard_error(rows, base) == pytest.approx(0.0, abs=1e-12)
    rows["a"]["each"] = [1.0, None, 6.0]  # all samples of a digit failed: it is left out
    assert _inverse_digits.standard_error(rows) == pytest.approx(np.std([2, 7], ddof=1) / np.sqrt(2))


def test_measurements_in_one_form_are_those_of_their_operators():
    """Zeros at the end change no likelihood but by a constant, and the baseline is the exact posterior."""
    image = np.random.default_rng(0).uniform(-1, 1, (1, 8, 8, 1)).astype(np.float32)
    for a in _inverse_problems.linear_operators(0).values():
        assert np.linalg.norm(a, 2) == pytest.approx(1)
        problem = _inverse_problems.linear_problem(a, image, 0.05, 1)
        seen = jax.tree.map(lambda leaf: leaf[0], problem.seen)
        y = np.asarray(seen.y, np.float64)
        if len(a) <= 64:
            np.testing.assert_allclose(seen.operator(jnp.asarray(image[0]))[: len(a)], a @ image.ravel(), atol=1e-5)
            assert not np.any(y[len(a) :])
    law = diffjax.oracles.wiener(np.random.default_rng(1).normal(size=(100, 8, 8, 1)))
    a = np.asarray(seen.operator.entries, np.float64)
    covariance = np.asarray(law.vectors) * law.variances @ np.asarray(law.vectors).T
    gain = covariance @ a.T @ np.linalg.inv(a @ covariance @ a.T + 0.05**2 * np.eye(64))
    mean = law.mean.ravel() + gain @ (y - a @ law.mean.ravel())
    deviation = np.sqrt(np.diag(covariance - gain @ a @ covariance))
    draws = _inverse_digits.gaussian(law, {"": problem}, 4000, jax.random.key(0))["samples"].reshape(4000, 64)
    assert np.all(np.abs(draws.mean(0) - mean) < 5 * deviation / np.sqrt(4000) + 1e-5)
    np.testing.assert_allclose(draws.std(0), deviation, rtol=5 / np.sqrt(2 * 4000))


def test_own_images_have_the_exact_posterior_of_their_patches():
    """Draws are those of the Gaussian that a patch is given what is seen of it; what is seen is known up to noise."""
    side, task = 16, _photographs.restorations(16, 0)["inpainting"]
    root = np.random.default_rng(0).normal(size=(64, 64)) / 8
    covariance = root @ root.T + 0.1 * np.eye(64)
    law = diffjax.oracles.mixture([1.0], np.zeros((1, 8, 8, 1)), covariance[None])
    truth = _inverse_photographs.own_images(law, 1, side, jax.random.key(0))
    np.testing.assert_array_equal(_inverse_photographs.tiled(_inverse_photographs.cut(truth[0]), side), truth[0])
    np.testing.assert_array_equal(_inverse_photographs.cut(truth[0])[1, ..., 0], truth[0, :8, 8:, 0])
    draws = _inverse_photographs.exact_draws(law, task, truth, 400, 0, jax.random.key(1))[0]
    seen = np.zeros((side, side, 1))
    seen.reshape(-1)[task.operator.indices] = _photographs.measured(task, truth, 0).y[0]
    a = np.diag(_inverse_photographs.cut((seen != 0) * 1.0)[1].ravel())
    gain = covariance @ a @ np.linalg.inv(a @ covariance @ a + task.std**2 * np.eye(64))
    mean = gain @ _inverse_photographs.cut(seen)[1].ravel()
    deviation = np.sqrt(np.diag(covariance - gain @ a @ covariance))
    found = draws[:, :8, 8:].reshape(400, 64)
    assert np.all(np.abs(found.mean(0) - mean) < 5 * deviation / 20)
    np.testing.assert_allclose(found.std(0), deviation, rtol=5 / np.sqrt(800))


def test_crops_are_not_among_the_patches():
    patches, images = _photographs.Patches(16), _photographs.photographs()
    assert all(part.shape[1] == _photographs.SPLIT for part in patches.images)
    last = patches.__getitems__([len(patches) - 1])[0][0]
    np.testing.assert_array_equal(last[..., 0], patches.images[1][-16:, -16:])
    for image, crop, (row, column) in zip(images, _photographs.crops(48), _photographs.CORNERS, strict=True):
        assert column >= _photographs.SPLIT + _photographs.GAP and crop.shape == (48, 48, 1)
        np.testing.assert_array_equal(crop[..., 0], image[row : row + 48, column : column + 48])


def check_parallel(folder, result, output):
    assert "stands in" in output  # there is no trained model
    found = json.loads((folder / "parallel.json").read_text())
    for problem in ("digits", "mixture"):
        for line in found[problem]["traces"]:
            errors = line["errors"]
            assert len(errors) <= line["steps"] + 1 and errors[-1] < 1e-5 * max(errors)  # exact after as many rounds
        assert {point["steps"] for point in found[problem]["grids"]} == {6, 12}
    points = found["digits"]["tolerances"]
    assert points[0]["tol"] > points[-1]["tol"] and points[0]["error"] > points[-1]["error"]
    assert points[0]["rounds"] < points[-1]["rounds"] < 12 < points[-1]["nfe"]
    wide, narrow = (next(p for p in found["digits"]["windows"] if p["window"] == n) for n in (12, 4))
    assert wide["rounds"] <= narrow["rounds"] and wide["inflation"] > narrow["inflation"] > 1
    assert [entry["name"] for entry in found["digits"]["others"]] == ["parareal"]
    assert found["digits"]["others"][0]["last"] < 1e-4
    assert (folder / "parallel.png").stat().st_size > 5000


def test_the_distance_of_gaussians_is_that_of_their_quantiles():
    # in one dimension the 2-Wasserstein distance is that of (mean, standard deviation)
    found = solvers.bures(np.array([1.0]), np.array([[4.0]]), np.array([4.0]), np.array([[36.0]]))
    assert found == pytest.approx(5.0)


def test_moments_of_a_deterministic_solver_are_those_of_its_flow():
    # DDIM is exact for a point: the data's mean stays where it is, at every number of steps
    grid = diffjax.grids.log_snr(diffjax.processes.vp(), 7, to_data=False)
    mean, covariance = moments(ddim(), grid, np.array([1.0, -2.0]), np.zeros((2, 2)))
    np.testing.assert_allclose(mean, grid.s.alpha[-1] * np.array([1.0, -2.0]), rtol=1e-12)
    np.testing.assert_allclose(covariance, grid.s.sigma[-1] ** 2 * np.eye(2), rtol=1e-12)


def check_baselines(folder, results, output):
    """Both samplers, on latents here: every cell is measured, guidance costs twice, and the table has them all."""
    cells = {(r.sampler, r.steps, r.scale): r for r in results}
    assert set(cells) == {(name, n, w) for name in ("DDPM", "DDIM") for n in (2, 3) for w in (1.0, 2.0)}
    for (_, steps, scale), result in cells.items():
        assert result.nfe == steps * (2 if scale > 1 else 1) and result.seconds > 0
        assert np.all(np.isfinite(list(result.metrics.values())))
    assert len((folder / "baselines.csv").read_text().splitlines()) == 1 + len(cells) + 2
    assert (folder / "baselines.png").stat().st_size > 5000


def test_latents_are_principal_components():
    """There and back is the projection on the leading axes; the largest latent has variance 1."""
    images = np.random.default_rng(0).normal(size=(50, 8, 8, 1)) * np.linspace(0.1, 1, 64).reshape(8, 8, 1)
    space = baselines.spaces(baselines.Options(components=5), images)["latent"]
    latents = space.encode(images)
    np.testing.assert_allclose(latents.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.cov(latents.T, bias=True)[0, 0], 1, rtol=1e-5)
    flat = images.reshape(50, 64) - images.reshape(50, 64).mean(0)
    values = np.linalg.eigvalsh(flat.T @ flat)[::-1]
    np.testing.assert_allclose(np.sum((space.decode(latents) - images) ** 2), values[5:].sum(), rtol=1e-5)
    assert space.shape == (5,) and latents.shape == (50, 5)


def check_fields(folder, result, output):
    """Every law of both systems, and pictures."""
    for condition in ("field", "temperature"):
        points = result["magnet"][condition]
        assert set(points) == {"exact", "extrapolated law", "classifier_free", "characteristic"}
        assert all(len(each) == 2 for each in points.values())
        # at scale 1 there is no guidance, and the noise is the same: what is left is round-off before the sign
        same = [points[name][0]["size"] for name in ("extrapolated law", "classifier_free", "characteristic")]
        np.testing.assert_allclose(same, same[0], atol=0.05)
    (each,) = result["lorenz"].values()
    assert each["probability"] == pytest.approx(0.1, abs=0.01) and len(each["estimates"]) == 2
    assert all(np.isfinite(each[name]["distance"]) for name in ("guided", "particles"))
    assert each["twist"][-1] == pytest.approx(each["probability"], abs=4 * np.sqrt(0.1 * 0.9 / 16))
    for picture in ("magnet", "lorenz"):
        assert (folder / f"{picture}.png").stat().st_size > 5000


def check_guidance(folder, result, output):
    """What is measured beside the model, and pictures."""
    assert len(result["probe"]["errors"]) == 5 and np.all(np.isfinite(result["probe"]["errors"]))
    assert len(result["classifier"]["ways"]) == 4
    noise = result["initial_noise"]
    assert noise["evaluations"]["guided"] == 2 * noise["evaluations"]["refined"]
    assert noise["norm"]["moved"] < 1e-4 and noise["distance"]["guided"] == 0
    assert np.all(np.isfinite(list(result["fractal"]["w2"].values())))
    for picture in ("curves", "probe", "classifier", "noise", "fractal"):
        assert (folder / f"{picture}.png").stat().st_size > 5000


def check_reflection(folder, result, output):
    """Success by number of samples, which does not fall, and pictures."""
    assert set(result["success"]) == {"best of n, base model", "best of n, told nothing", "reflection"}
    assert all(len(rate) == 3 and np.all(np.diff(rate) >= 0) for rate in result["success"].values())
    assert set(result["evaluations a wish"].values()) == {6.0}  # three samples of two steps
    for picture in ("success", "rounds"):
        assert (folder / f"{picture}.png").stat().st_size > 5000


def test_the_judge_of_reflection_sees_what_is_there():
    """Canvases of real digits: their attributes; words and rewards of four wishes; the best listener by enumeration."""
    real = digits.held_out_digits(None)[1]
    see = reflection.attributes(real)
    look = jax.jit(jax.vmap(lambda x, *parts: see(reflection.canvas(x, *parts))))
    parts = np.random.default_rng(0).integers(0, 3, (3, 40))
    found = np.asarray(look(jnp.asarray(real.images[:40]), *map(jnp.asarray, parts)))
    np.testing.assert_array_equal(found, np.stack([real.labels[:40], *parts], 1))
    wishes = [[3, 1, 1, 1], [3, 0, 2, 1], [4, 1, 1, 2]]
    words, rewards = zip(*(reflection.said(jnp.array([3, 1, 1, 1]), jnp.array(wish)) for wish in wishes), strict=True)
    assert np.asarray(words).tolist() == [[0, 0, 0, 0], [0, 2, 1, 0], [3, 0, 0, 1]]
    assert np.asarray(rewards).tolist() == [0, -2, -4]
    # of three values in a row: right at once 1/3; at the second guess 1 - P(two are left, and the other one it is)
    np.testing.assert_allclose(reflection.best_listener(3), [1 / 27, (7 / 9) ** 3, 1])


def check_corrupted(folder, result, output):
    """A distance and an error for every round, and the references."""
    (each,) = result["kinds"].values()
    assert len(each["distance"]) == len(each["error"]) == 3 and np.all(np.isfinite(each["distance"]))
    assert 0 < result["references"]["floor"] < each["distance"][-1]
    for picture in ("rounds", "samples"):
        assert (folder / f"{picture}.png").stat().st_size > 5000


def test_what_is_seen_of_corrupted_digits():
    """As many numbers as were asked for, with their noise, other ones for every digit."""
    options = corrupted.Options()
    x = np.random.default_rng(0).uniform(-1, 1, (64, 64)).astype(np.float32)
    for kind, count in (("masks", 32), ("projections", 24)):
        seen, back = corrupted.observed(options, kind, jnp.asarray(x), jax.random.key(0))
        measured = jax.vmap(seen)(jnp.arange(64))
        residual = np.asarray(jax.vmap(lambda m, x: m.residual(x))(measured, jnp.asarray(x)))
        used = residual[residual != 0]
        assert len(used) == 64 * count and abs(used.std() / options.noise - 1) < 4 / np.sqrt(2 * len(used))
        assert np.linalg.matrix_rank(np.asarray(back)) == 64  # one subspace of 24 for all would leave it at 24


def _enumerated(beta, fields):
    """All states of a small magnet and their probabilities."""
    states = _ising.ring_states(fields.size).reshape(-1, *fields.shape)
    energy = (states * np.roll(states, 1, 2)).sum((1, 2)) + (states[:, 1:] * states[:, :-1]).sum((1, 2))
    exponents = beta * energy + (states * fields).sum((1, 2))
    return states, energy, exponents, np.exp(exponents) / np.exp(exponents).sum()


def test_the_magnet_is_that_of_all_its_states(x64):
    """Log Z, observables and the denoiser against the sum over 2^9 states."""
    states, energy, exponents, p = _enumerated(0.4, np.full((3, 3), 0.13))
    np.testing.assert_allclose(_ising.log_partition(0.4, jnp.full((3, 3), 0.13)), np.log(np.exp(exponents).sum()))
    m, found = states.mean((1, 2)), _ising.exact(0.4, 0.13, (3, 3))
    np.testing.assert_allclose(found, (p @ m, np.sqrt(p @ m**2), p @ energy / 15), rtol=1e-5)
    level, x = diffjax.processes.vp().level(0.4), np.random.default_rng(0).normal(size=(3, 3))
    _, _, _, seen = _enumerated(0.4, 0.13 + level.alpha * x / level.sigma**2)
    estimate = _ising.Ising((0.4, 0.13))(jnp.asarray(x), level)
    np.testing.assert_allclose(estimate, np.einsum("n,nij->ij", seen, states), rtol=1e-9)
    weights = np.random.default_rng(1).choice(len(p), 20000, p=p)
    np.testing.assert_allclose(_ising.measured(states[weights]), found, atol=4 / np.sqrt(20000))


@pytest.mark.paper("Characteristic Guidance: Non-linear Correction for Diffusion Model at Large Guidance Scale")
def test_guidance_by_a_field_is_exact_for_spins(x64):
    """A linear tilt of a law that is anything but Gaussian, at scale 8; plain guidance is wrong."""
    generator, scale, plain = np.random.default_rng(0), 8.0, _ising.Ising((0.3, 0.05))
    spins, eps = generator.choice([-1.0, 1.0], (4, 3, 3)), generator.normal(size=(4, 3, 3))
    levels = diffjax.processes.vp().level(np.array([0.3, 0.45]))

    def estimates(level, spin, eps):
        x, shift = level.alpha * spin + level.sigma * eps, level.sigma**2 * 0.05 / level.alpha
        both = plain(x + (scale - 1) * shift, level), _ising.Ising((0.3, 0.0))(x + scale * shift, level)
        guided = guidance.characteristic(plain, (0.3, 0.0), scale, 200, 0)(x, level)
        naive = guidance.classifier_free(plain, (0.3, 0.0), scale)(x, level)
        return _ising.Ising((0.3, scale * 0.05))(x, level), *both, guided, naive

    many = jax.jit(jax.vmap(jax.vmap(estimates, (None, 0, 0)), (0, None, None)))
    wanted, *both, guided, naive = many(levels, spins, eps)
    for each in both:  # with the shift sigma^2 field / alpha both are the estimate that is wanted
        np.testing.assert_allclose(each, wanted, rtol=1e-9, atol=1e-12)
    assert np.abs(guided - wanted).max() < 1e-3  # the plain iteration is slow and sure
    assert np.abs(naive - wanted).max() > 0.1


@pytest.mark.parametrize("history", [2, 3])
def test_guidance_of_spins_does_not_end_where_both_estimates_saturate(history, x64):
    """Accelerated, the iteration finds the solution from all states, as the plain one does, and nearer."""
    generator, scale, plain = np.random.default_rng(1), 8.0, _ising.Ising((0.3, 0.05))
    spins, eps = generator.choice([-1.0, 1.0], (64, 3, 3)), generator.normal(size=(64, 3, 3))
    level = diffjax.processes.vp().level(0.45)

    def error(spin, eps):
        x = level.alpha * spin + level.sigma * eps
        wanted = _ising.Ising((0.3, scale * 0.05))(x, level)
        return jnp.abs(guidance.characteristic(plain, (0.3, 0.0), scale, 30, history)(x, level) - wanted).max()

    errors = jax.jit(jax.vmap(error))(spins, eps)
    assert errors.max() < 5e-3 and np.median(errors) < 1e-5, errors  # plain: 3e-3, 1e-3


def test_trajectories_are_denoised_as_a_mixture_is(x64):
    paths = _lorenz.trajectories(40, times=4)
    x, level = np.random.default_rng(0).normal(size=(4, 3)), diffjax.processes.vp().level(0.3)
    expected = diffjax.oracles.mixture(np.ones(40), paths, np.full(40, 0.04))(jnp.asarray(x), level)
    denoise = _lorenz.Trajectories(jnp.asarray(paths, float), 0.2)
    np.testing.assert_allclose(denoise(jnp.asarray(x), level), expected, rtol=1e-6)
    limit, draws = _lorenz.rejected(_lorenz.lobe, 0.1, paths, 0.2)
    assert len(draws) == 32 and np.all(draws[:, :, 0].mean(1) > limit)
    # on the attractor, where z stays within known bounds, and all of them go somewhere
    assert np.abs(paths).max() < 4 and paths.std(0).min() > 0.3


def test_the_calibration_error_is_the_gap_of_confidence_and_accuracy():
    logits = np.log(np.array([[0.75, 0.25]] * 8))
    labels = np.array([0] * 4 + [1] * 4)
    assert _guided_digits.calibration_error(logits, labels) == pytest.approx(0.25)
    assert _guided_digits.calibration_error(logits, np.array([0] * 6 + [1] * 2)) == pytest.approx(0.0)
