"""The training loop: steps, progress, metrics, checkpoints, and an orderly end whatever happens.

* Every `log_every` steps a line of `folder/metrics.jsonl`: step, mean loss, gradient norm, steps/s.
* Every `save_every` steps, at the start and at the end a checkpoint.
* SIGTERM (preemption): the step is finished, a checkpoint written, the process exits with status 0.
* A loss or gradient that is not finite stops the run; nothing after the last good checkpoint is kept.
"""

import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from diffjax.training import checkpoint
from diffjax.training.step import Metrics, TrainState


def fit(
    state: TrainState,
    step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    batches: Any,
    *,
    steps: int,
    folder: str | os.PathLike | None = None,
    resume: bool = False,
    save_every: int = 500,
    keep: int = 3,
    log_every: int = 50,
    config: dict[str, Any] | None = None,
    architecture: dict[str, Any] | None = None,
    progress: bool = True,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> TrainState:
    """Train until `state.step` is `steps`.

    Args:
        state: from `init`; its memory is reused, so only the returned state is valid afterwards.
        step: from `train_step`.
        batches: an iterator over what `step` takes as a batch; with `get_state` and `set_state` (as
            from `data.batches`) its place is part of the checkpoint, and a resumed run is exact.
        steps: the total, including those before a resumption.
        folder: where checkpoints and metrics go; None keeps nothing.
        resume: go on from the newest checkpoint in `folder`, and from the start if it has none yet.
        save_every, keep: a checkpoint every so many steps; how many stay.
        log_every: a line of metrics every so many steps.
        config, architecture: JSON objects stored with every checkpoint
            (`networks.architecture(apply)`); a stored architecture must equal the one given here.
        progress: a bar with the time left.
        report: called as `report(step, {"loss": ..., ...})` with every line of metrics, for other logs.

    Returns:
        the state after the last step.

    Raises:
        ValueError: sizes below one; a folder in use without `resume`; a checkpoint of another run;
            batches that end too soon.
        FileNotFoundError: `resume` with a folder that does not exist.
        FloatingPointError: a loss or gradient norm that is not finite; says at which step.
        SystemExit: with status 0, after SIGTERM.
    """
    for name, number in {"steps": steps, "save_every": save_every, "log_every": log_every, "keep": keep}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    resumed = False
    stateful = hasattr(batches, "get_state") and hasattr(batches, "set_state")
    if resume:
        if folder is None:
            raise ValueError("resume=True needs the folder of the run")
        resumed = bool(checkpoint.steps(folder)) or not Path(folder).is_dir()
        if resumed:
            state = _resume(state, batches if stateful else None, folder, architecture)
    elif folder is not None and checkpoint.steps(folder):
        raise ValueError(
            f"folder {os.fspath(folder)!r} has checkpoints of steps {checkpoint.steps(folder)}: "
            "pass resume=True to go on from them, or another folder"
        )
    first = int(state.step)
    log = _Log(folder, first, report)
    saved = first if resumed else None

    def save() -> None:
        nonlocal saved
        log.check(0)
        if folder is not None and saved != int(state.step):
            place = batches.get_state() if stateful else None
            checkpoint.save(folder, state, iterator=place, config=config, architecture=architecture, keep=keep)
            saved = int(state.step)

    iterator = iter(batches)
    shown = progress and jax.process_index() == 0
    # In a log file every refresh is a line of its own.
    pace = 0.2 if sys.stderr.isatty() else 5.0
    bar = tqdm(total=steps, initial=first, disable=not shown, unit="step", mininterval=pace)
    with bar, _termination() as stop:
        save()  # at once: a folder that cannot be written is better known before the work
        for number in range(first, steps):
            try:
                batch = next(iterator)
            except StopIteration:
                raise ValueError(f"batches ended after {number} of steps={steps}") from None
            state, metrics = step(state, batch)
            log.add(number, metrics)
            # One step is always in flight; reading an older result does not hold the device up.
            log.check(1)
            done = number + 1
            if done % log_every == 0 or done == steps:
                bar.set_postfix(loss=f"{log.write(done):.4f}", refresh=False)
            bar.update()
            if done % save_every == 0 or done == steps or stop.is_set():
                save()
            if stop.is_set() and done < steps:
                bar.write(f"SIGTERM: saved step {done}" if folder is not None else "SIGTERM: not saved, no folder")
                raise SystemExit(0)
    return state


def _resume(
    state: TrainState, batches: Any, folder: str | os.PathLike, architecture: dict[str, Any] | None
) -> TrainState:
    """The state of the newest checkpoint, and the data's iterator put in its place."""
    found = checkpoint.restore(folder, state)
    if None not in (architecture, found.architecture) and architecture != found.architecture:
        raise ValueError(
            f"the checkpoint in {os.fspath(folder)!r} is of another architecture: expected "
            f"{architecture}, found {found.architecture}"
        )
    if batches is None:
        warnings.warn("the batches have no set_state: the resumed run sees its data from the start", stacklevel=3)
    else:
        if found.iterator is None:
            raise ValueError(f"the checkpoint in {os.fspath(folder)!r} has no state of a data iterator")
        batches.set_state(found.iterator)
    return found.state


class _Log:
    """Metrics on their way from the device to `metrics.jsonl`."""

    def __init__(
        self,
        folder: str | os.PathLike | None,
        first: int,
        report: Callable[[int, dict[str, float]], None] | None = None,
    ):
        self.report = report
        self.folder, self.waiting, self.recent = folder, deque(), []
        self.started, self.begun = time.perf_counter(), time.perf_counter()
        self.file = None
        if folder is not None and jax.process_index() == 0:
            self.file = Path(folder) / "metrics.jsonl"
            self.file.parent.mkdir(parents=True, exist_ok=True)
            _forget_after(self.file, first)

    def add(self, step: int, metrics: Metrics) -> None:
        self.waiting.append((step, metrics))

    def check(self, behind: int) -> None:
        """Read all but the newest `behind` metrics; FloatingPointError at the first not finite."""
        while len(self.waiting) > behind:
            step, metrics = self.waiting.popleft()
            loss, norm = float(metrics.loss), float(metrics.gradient_norm)
            if not (np.isfinite(loss) and np.isfinite(norm)):
                known = checkpoint.steps(self.folder) if self.folder is not None else []
                last = f"the last good checkpoint is step {known[-1]} in {self.folder}" if known else "none was saved"
                raise FloatingPointError(f"loss is {loss} and gradient norm {norm} at step {step}; {last}")
            self.recent.append((loss, norm))

    def write(self, done: int) -> float:
        """A line of metrics, averaged since the last one; returns the mean loss."""
        self.check(0)
        loss, norm = np.mean(self.recent, axis=0).tolist()
        now = time.perf_counter()
        rate = len(self.recent) / (now - self.started)
        self.recent, self.started = [], now
        line = {
            "loss": loss,
            "gradient_norm": norm,
            "steps_per_second": round(rate, 3),
            "seconds": round(now - self.begun, 3),
        }
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": done, **line}) + "\n")
        if self.report is not None:
            self.report(done, line)
        return loss


def _forget_after(file: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint; their steps are run again."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text().splitlines():
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            keep = False  # cut off by the kill
        if keep:
            kept.append(line + "\n")
    draft = file.with_suffix(".tmp")
    draft.write_text("".join(kept))
    draft.replace(file)


@contextmanager
def _termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, while the block runs; only the main thread can listen."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
