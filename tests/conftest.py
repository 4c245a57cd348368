"""Options and fixtures of the whole suite."""

import pytest

import boltz_mm  # noqa: F401 - repairs torchvision before a test file imports mmdet


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--parity-root', default=None, help='folder of golden cases to hold instead of the carried ones')
