"""The parts of `benchmarks.posterior`: problems with an exact posterior, methods with their settings, the page."""
