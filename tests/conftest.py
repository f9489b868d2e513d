"""The settings of every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# No deadline, and no check of how long examples take: how busy the machine is says nothing about the code. A test may
# use one folder for all of its examples, because each example writes over what the one before wrote.
settings.register_profile(
    "nibblecast", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("nibblecast")
