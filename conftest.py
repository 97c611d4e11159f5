"""Set up JAX before its import: eight virtual CPU devices, and types checked at run time.

It stands here, not in tests/, for the doctests in diffjax/ to have the same setting.
"""

import gc
import os
from pathlib import Path

FLAGS = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
# Compiled programs are kept, so that a second run spends its time on testing.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of a test's time is compilation of small programs that run once, a third of which is LLVM's optimiser:
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test runs what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

install_import_hook("diffjax", "beartype.beartype")

hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# Every compiled program takes some 30 memory maps of the process, of which Linux allows 65530: after two thousand tests
# the next compilation would be the last one.
MAPS, MOST_MAPS = Path("/proc/self/maps"), 20_000


@pytest.fixture(autouse=True)
def forget_programs():
    """Drop compiled programs when a worker holds too many; the persistent cache has them."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def x64():
    """Run one test in float64."""
    with jax.enable_x64(True):
        yield
