"""Options and fixtures of the whole suite."""

from __future__ import annotations

import pytest
from hypothesis import settings

# The same examples in every run, and no limit on the time of one: other programs share the machine.
settings.register_profile("asyncckpt", derandomize=True, deadline=None, database=None)
settings.load_profile("asyncckpt")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="run the fault campaigns at every point instead of a sample (an hour or more)"
    )


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """Whether campaigns cover every point; CI takes a fixed sample of them."""
    return bool(request.config.getoption("--full"))
