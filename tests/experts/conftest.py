"""These tests compile many small programs."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _quickly(quick_compilation):
    """All of them."""
