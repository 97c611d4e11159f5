"""diffjax against recorded results of diffusers, k-diffusion and azula on the same levels: `benchmarks/parity.py`."""

import json

import pytest

from benchmarks import parity


def test_every_recorded_sampler_is_matched():
    assert set(parity.matches()) == set(json.loads(parity.DATA.read_text())["cases"])
    assert set(parity.DEVIATIONS) <= set(parity.matches())


@pytest.mark.parametrize("name", sorted(parity.matches()))
def test_the_same_sampler_gives_the_same_states(name):
    (found,) = parity.compare((name,), (20,))
    if name in parity.DEVIATIONS:
        assert parity.TOLERANCE < found.difference < 0.05  # known, and explained on the page
    else:
        assert found.difference < parity.TOLERANCE
