"""Restore digits and photographs from measurements by every inverse method: pictures, errors and calibration.

    python -m experiments.inverse
    python -m experiments.inverse --digits runs/digits   # the model of experiments.digits instead of training one

Digits: an unconditional model is the prior; held-out digits are measured by seven linear operators, three nonlinear
ones and a counter of photons.  Estimates are means of posterior samples.  Beside PSNR and SSIM stand the distance of
single samples to the truth in the features of a classifier of digits, and how often the interval of all samples of a
pixel holds the truth, widened by the half grey level to which the truth is rounded (of nine samples, 0.8 is right).
The baseline is the exact posterior of a Gaussian prior with the data's covariance.

Photographs: two that scikit-learn ships.  Patches of one part are learned by a mixture of Gaussians and by a network;
crops of the other part are restored with the mean over overlapping patches' estimates as the denoiser, against a
classical method each.  Images drawn from the mixture itself, which has an exact posterior, tell the methods' share of a
wrong coverage from the prior's.

Choices: which pixels to measure (`active` against random ones and those of the largest variance), inpainting by the
noise (`d_flow`), and intervals with a guarantee (`rcps`, `k_rcps`).

Writes digits.png (measurement, reconstruction, samples, deviation), methods.png (every method's reconstructions),
calibration.png, photographs.png, choices.png, metrics.json.

Run time: 7 min on 2 CPU cores.
Expect. Digits, PSNR of the mean, over eight digits with standard errors of the gain on the baseline, 16.8 dB: mmps 20.6
(gain 3.9 +- 0.4), tds 20.4 (3.7 +- 0.5), pigdm and tmpd 20.0, mcg 19.5, red_diff 19.4, daps 19.3, pnp_dm 19.0, dps
18.7, repaint, diffpir, lanpaint and ddrm 18.4 to 18.5, ddnm and flowchef 17.6, replacement 17.0 (0.3 +- 0.3). Coverage
.83 to .94, the baseline's .86. Nonlinear: enkg 18.8 but .54, lgd 18.6, flowchef 18.0, daps 17.5, dps 17.4; the error of
a mean is 0.5 to 1. Counts: daps 18.9, pnp_dm 18.7.
With 16 pixels chosen by `active` 18.5 dB, of the largest variance 17.4, by chance 14.1; with 8 15.0, 15.5 and 13.1 (six
digits). `d_flow` fills in the hidden part to 13.2 dB, often another digit than the true one, the mean of `pigdm` to
18.5 (four digits). Intervals miss .28 of the pixels; for a risk of at most .1, `rcps` misses .047 at length .84,
`k_rcps` .046 at .82.
Photographs (two crops: differences below about 1 dB mean nothing), PSNR of the mean, best learned against classical:
deblurring 27.1 (ddrm, network) and 23.4 dB, inpainting 25.4 (mmps) and 24.4 (ddrm and diffpir are worse, 21.8 to 23.6),
super-resolution 26.7 and 26.7: a cubic spline is as good, if not by SSIM (.84 and .82). Coverage, of nine samples .8 is
right: mmps .77 to .79, ddrm .57 to .69, diffpir .46 to .62. On images of the mixture itself the exact posterior has
.81, mmps .73, ddrm .77, diffpir .74: so it is not the mixture that is too sure of photographs, but ddrm and diffpir,
with the network more than with the mixture.
With a mixture of 30 Gaussians fitted to digits in place of the network (measured apart), for which draws of the exact
posterior have a mean of 19.7 dB and the Gaussian baseline has 16.4: mmps and tds 19.3, pigdm 19.0, red_diff 18.4, daps
18.2, ddrm 17.3, ddnm 17.0 (both without a cutoff), replacement 16.6. In the last three what is hidden hears of y
through the network alone: that costs 3 dB.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import (
    _classifier,
    _inverse_choices,
    _inverse_digits,
    _inverse_photographs,
    _inverse_trained,
    _run,
    digits,
)

PARTS = ("digits", "photographs", "pixels", "noise", "intervals")
MORE = ("trained",)  # on request
TINY = (
    *("--steps", "2", "--batch", "8", "--channels", "8", "--classifier-steps", "2", "--images", "1", "--draws", "2"),
    *("--levels", "4", "--methods", "ddrm", "--tasks", "inpainting", "--patch-methods", "ddrm", "--components", "2"),
    *(
        "--network-methods",
        "ddrm",
    ),
    *("--patches", "60", "--patch-steps", "2", "--patch-channels", "8", "--crop", "24", "--crop-draws", "2"),
    *("--calibration", "10", "25", "5", "--parts", "digits", "photographs", "intervals"),
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Restore digits and photographs."""

    digits: Path | None = None
    """Folder of a run of experiments.digits whose model is the prior; none: one is trained here."""
    steps: int = 1000
    """Training steps of that model, where it is trained here."""
    batch: int = 128
    """Images per training step."""
    channels: tuple[int, ...] = (32, 64)
    """Features of the U-Net at each resolution."""
    classifier_steps: int = 300
    """Training steps of the classifier whose features are compared."""
    images: int = 8
    """Digits that are restored."""
    draws: int = 9
    """Posterior samples of each."""
    levels: int = 24
    """Steps of the samplers."""
    std: float = 0.05
    """Of the measurements' noise, in units of the largest singular value."""
    methods: tuple[str, ...] = ()
    """Methods on digits; none named: all."""
    tasks: tuple[str, ...] = ("deblurring", "2x super-resolution", "inpainting")
    """What is restored in photographs."""
    patch_methods: tuple[str, ...] = ("mmps", "ddrm", "diffpir")
    """Methods on photographs with the mixture, and on its own images."""
    network_methods: tuple[str, ...] = ("ddrm", "diffpir")
    """Methods on photographs with the network: those without derivatives are cheap."""
    components: int = 24
    """Gaussians in the mixture of patches."""
    patches: int = 6000
    """Patches that it is fitted to."""
    patch_steps: int = 400
    """Training steps of the network of patches."""
    patch_channels: tuple[int, ...] = (16, 32)
    """Features of that network."""
    crop: int = 48
    """Pixels along each side of the crops that are restored."""
    crop_draws: int = 9
    """Posterior samples of each crop."""
    pixels: tuple[int, ...] = (4, 8, 16)
    """How many pixels are measured, where they are chosen."""
    pixel_images: int = 6
    """Digits of which pixels are chosen."""
    noise_images: int = 4
    """Digits that are inpainted by the noise."""
    calibration: tuple[int, int, int] = (60, 100, 100)
    """Digits that choose margins, that calibrate them, and that judge them."""
    parts: tuple[str, ...] = PARTS
    """What is done; `trained` adds the inverse methods that train something."""
    seed: int = 0
    """Seed of everything that is random."""
    out: Path = Path("runs/inverse")
    """Output folder."""


def report(result: dict[str, Any]) -> str:
    """All numbers."""
    lines = _inverse_digits.report(result["digits"], result["calls"])
    for task, each in result["photographs"].items():
        lines.append(f"{task:32}" + "".join(f"{name:>14}" for name in next(iter(each.values()))))
        for name, row in each.items():
            lines.append(f"  {name:30}" + "".join(f"{'-' if v is None else f'{v:.3f}':>14}" for v in row.values()))
    for name in ("pixels", "noise", "intervals", "trained"):
        lines += [f"{name}: {result[name]}"] if result[name] else []
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run with command-line arguments (default: those of the process); returns what metrics.json holds."""
    with _run.start(Options, arguments) as run:
        options, clock = run.options, run.clock
        unknown = set(options.parts) - {*PARTS, *MORE}
        if unknown:
            raise ValueError(f"parts {sorted(unknown)} are not among {(*PARTS, *MORE)}.")
        keys = jax.random.split(jax.random.key(options.seed + 1), 8)
        result: dict[str, Any] = {name: {} for name in ("digits", "calls", "photographs", *PARTS[2:], "trained")}
        if set(options.parts) & {"digits", "pixels", "noise", "intervals"}:
            images, real, held_out = digits.held_out_digits(None)
            with clock("training"):
                model = _model(run, images)
                classifier = _classifier.train(keys[0], images, options.classifier_steps, options.batch, run)
            given = _inverse_digits.Given(model, classifier, real.images, held_out)
            if "digits" in options.parts:
                with clock("digits"):
                    result["digits"], result["calls"] = _inverse_digits.part(run, given, keys[1])
            with clock("choices"):
                result |= _inverse_choices.part(run, given, keys[3:])
        if "photographs" in options.parts:
            with clock("photographs"):
                result["photographs"] = _inverse_photographs.part(run, keys[2])
        if "trained" in options.parts:
            with clock("trained"):
                result["trained"] = _inverse_trained.part(run, keys[6])
        result["seconds"] = clock.seconds
        (run.out / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
        print(report(result))
        print(f"{clock}; pictures and metrics.json are in {run.out}/")
    return result


def _model(run: _run.Run[Options], images: Any) -> digits.Model:
    """The digits' model: that of another run, or one that is trained here."""
    options = run.options
    if options.digits is not None:
        model = digits.load(options.digits)
    else:
        wanted = digits.Options(
            steps=options.steps,
            batch=options.batch,
            channels=options.channels,
            seed=options.seed,
            out=run.folder("training/model"),
        )
        model = digits.train(wanted, images, run.resume, run.log)
    return model


if __name__ == "__main__":
    main()
