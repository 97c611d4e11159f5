"""The training loop: steps, progress, metrics, checkpoints, and an orderly end whatever happens.

* Every `log_every` steps a line of `folder/metrics.jsonl`: step, mean loss, gradient norm, steps/s.
* Every `save_every` steps, at the start and at the end a checkpoint, written while the training goes on.
* SIGTERM (preemption): the step is finished, a checkpoint written, the process exits with status 0; of several
  processes all do so after the same step, whichever was told.
* A loss or gradient that is not finite stops the run; nothing after the last good checkpoint is kept.
* Of several processes the first alone writes metrics and shows progress.
"""

import json
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from diffjax import devices
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
    fixed: Sequence[str] = (),
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
        fixed: entries of `config` in which a resumed run must agree with its checkpoint.
        progress: a bar with the time left.
        report: called as `report(step, {"loss": ..., ...})` with every line of metrics, for other logs.

    Returns:
        the state after the last step.

    Raises:
        ValueError: sizes below one; a folder in use without `resume`; a checkpoint of another run, with other batches
            or another entry of `config` that is `fixed`; batches that end too soon.
        OSError: a checkpoint or the metrics cannot be written; checkpoints before stay.
        FileNotFoundError: `resume` with a folder that does not exist.
        FloatingPointError: a loss or gradient norm that is not finite; says at which step.
        SystemExit: with status 0, after SIGTERM.
    """
    for name, number in {"steps": steps, "save_every": save_every, "log_every": log_every, "keep": keep}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    found = None
    stateful = hasattr(batches, "get_state") and hasattr(batches, "set_state")
    if resume and folder is None:
        raise ValueError("resume=True needs the folder of the run")
    known = [] if folder is None else _agreed(folder)
    if resume and (known or not Path(folder or "").is_dir()):
        found = _resume(state, batches if stateful else None, folder or "", architecture, config or {}, fixed)
        state = found.state
    elif known:
        raise ValueError(
            f"folder {os.fspath(folder or '')!r} has checkpoints of steps {known}: "
            "pass resume=True to go on from them, or another folder"
        )
    writer = None if folder is None else checkpoint.Writer(folder)
    first = int(state.step)
    log = _Log(folder, first, writer, report)
    saved = None if found is None else first
    shapes = None if found is None else found.batch

    def save() -> None:
        nonlocal saved
        log.check(0)
        if writer is not None and saved != int(state.step):
            place = batches.get_state() if stateful else None
            about = {"config": config, "architecture": architecture, "batch": shapes}
            writer.save(state, iterator=place, keep=keep, **about)
            saved = int(state.step)

    iterator = iter(batches)
    shown = progress and jax.process_index() == 0
    # In a log file every refresh is a line of its own.
    pace = 0.2 if sys.stderr.isatty() else 5.0
    bar = tqdm(total=steps, initial=first, disable=not shown, unit="step", mininterval=pace)
    with writer or nullcontext(), bar, _termination() as stopping:
        save()  # at once: a folder that cannot be written is better known before the work
        for number in range(first, steps):
            try:
                batch = next(iterator)
            except StopIteration:
                raise ValueError(f"batches ended after {number} of steps={steps}") from None
            if number == first:
                shapes = _same_batches(step, batch, shapes)
            state, metrics = step(state, batch)
            log.add(number, metrics)
            # One step is always in flight; reading an older result does not hold the device up.
            log.check(1)
            done = number + 1
            if done % log_every == 0 or done == steps:
                bar.set_postfix(loss=f"{log.write(done):.4f}", refresh=False)
            bar.update()
            stop = stopping(done)
            if done % save_every == 0 or done == steps or stop:
                save()
            elif writer is not None:
                writer.check()
            if stop and done < steps:
                if writer is not None:
                    writer.wait()
                bar.write(f"SIGTERM: saved step {done}" if folder is not None else "SIGTERM: not saved, no folder")
                raise SystemExit(0)
    return state


def _agreed(folder: str | os.PathLike) -> list[int]:
    """The steps of the folder's checkpoints, which every host must see."""
    devices.meet("the run begins")
    known = checkpoint.steps(folder)
    if jax.process_count() > 1:
        newest = multihost_utils.process_allgather(np.asarray(max(known, default=-1)))
        if len(set(newest.tolist())) > 1:
            raise ValueError(
                f"folder {os.fspath(folder)!r} must be shared by all hosts, but they see newest checkpoints of steps"
                f" {newest.tolist()} (-1 is none)"
            )
    return known


def _same_batches(step: Any, batch: Any, expected: list[Any] | None) -> list[Any] | None:
    """The shapes of the global batch; the place of a data iterator is counted in batches, so they must not change."""
    if not hasattr(step, "described"):
        return expected
    found = step.described(batch)
    if expected is not None and expected != found:
        raise ValueError(
            f"batch is not that of the checkpoint, whose place in the data counts batches: expected {expected},"
            f" found {found}"
        )
    return found


def _resume(
    state: TrainState,
    batches: Any,
    folder: str | os.PathLike,
    architecture: dict[str, Any] | None,
    config: dict[str, Any],
    fixed: Sequence[str],
) -> checkpoint.Restored:
    """The newest checkpoint, and the data's iterator put in its place."""
    found = checkpoint.restore(folder, state)
    where = f"the checkpoint in {os.fspath(folder)!r}"
    if None not in (architecture, found.architecture) and architecture != found.architecture:
        raise ValueError(f"{where} is of another architecture: expected {architecture}, found {found.architecture}")
    for name in fixed:
        if name in found.config and config.get(name) != found.config[name]:
            raise ValueError(
                f"{where} is of another configuration: expected {name}={config.get(name)!r},"
                f" found {found.config[name]!r}"
            )
    if batches is None:
        warnings.warn("the batches have no set_state: the resumed run sees its data from the start", stacklevel=3)
    else:
        if found.iterator is None:
            raise ValueError(f"{where} has no state of a data iterator")
        batches.set_state(found.iterator)
    return found


class _Log:
    """Metrics on their way from the device to `metrics.jsonl`."""

    def __init__(self, folder: str | os.PathLike | None, first: int, writer: checkpoint.Writer | None, report: Any):
        self.folder, self.waiting, self.recent = folder, deque(), []
        self.writer, self.report = writer, report
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
                if self.writer is not None:
                    self.writer.wait()
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
def _termination() -> Iterator[Callable[[int], bool]]:
    """Whether to stop after a step: SIGTERM came while the block runs; only the main thread can listen."""
    if jax.process_count() > 1:
        # JAX's own handler, since `jax.distributed.initialize`: all processes are told of the same step.
        yield multihost_utils.reached_preemption_sync_point
        return
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: event.set())
    try:
        yield lambda step: event.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
