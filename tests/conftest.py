"""Options and fixtures of the whole suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--parity-root', default=None, help='folder of golden cases to hold instead of the carried ones')
