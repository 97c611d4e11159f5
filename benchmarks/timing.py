"""Timing on noisy machines: contestants take turns, and medians are compared."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


def interleaved(contestants: dict[str, Callable[[], Any]], seconds: float = 4.0, rounds: int = 7) -> dict[str, float]:
    """Median seconds of a call of each contestant; they take turns, so that a slow spell hits all of them.

    Every turn makes as many calls as fit into its share of ``seconds`` (at least one) and counts their mean.
    """
    calls = {}
    for name, run in contestants.items():
        jax.block_until_ready(run())
        start = time.perf_counter()
        jax.block_until_ready(run())
        once = time.perf_counter() - start
        calls[name] = max(1, int(seconds / len(contestants) / rounds / max(once, 1e-7)))
    turns: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                jax.block_until_ready(run())
            turns[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(values) for name, values in turns.items()}


def save(name: str, measured: dict[str, Any]) -> dict[str, Any]:
    """Write ``results/NAME.json`` with the device and the versions, and return it."""
    device = jax.devices()[0]
    record = {
        "device": device.device_kind if device.platform != "cpu" else f"CPU ({platform.machine()}, {_cores()} cores)",
        "jax": jax.__version__,
        "python": platform.python_version(),
        **measured,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
