"""How long hypothesis searches: the same examples each time, and as many as seconds allow."""

from __future__ import annotations

from hypothesis import HealthCheck, Verbosity, settings

# Derandomised, so that a failure is a failure of the code at hand; without a database, so that no
# run depends on an earlier one. Deadlines belong to machines with nothing else to do.
settings.register_profile(
    "mambamic",
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    verbosity=Verbosity.normal,
)
settings.load_profile("mambamic")
