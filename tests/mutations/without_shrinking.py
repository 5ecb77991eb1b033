"""A plugin of pytest: Hypothesis stops at the first failing example without shrinking it, since only the failure matters here."""

from __future__ import annotations

import hypothesis
from hypothesis import Phase


def pytest_configure() -> None:
    """After tests/conftest.py, which chooses the profile that this one changes."""
    phases = (Phase.explicit, Phase.generate)
    hypothesis.settings.register_profile("mutations", parent=hypothesis.settings.default, phases=phases)
    hypothesis.settings.load_profile("mutations")
