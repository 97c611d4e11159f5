"""The tests run in the setting that they rely on."""

import jax
import jax.numpy as jnp


def test_eight_virtual_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


def test_x64_is_on_where_asked(x64):
    assert jnp.ones(()).dtype == jnp.float64


def test_x64_is_off_elsewhere():
    assert jnp.ones(()).dtype == jnp.float32
