"""What all tests share: how long one takes says something of the machine alone, so no example of hypothesis is timed."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")
