"""Options and fixtures of the whole suite."""

import signal
from collections import OrderedDict

import pytest
from mmengine.registry import DefaultScope

import boltz_mm  # noqa: F401 - repairs torchvision before a test file imports mmdet


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--parity-root', default=None, help='folder of golden cases to hold instead of the carried ones')


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts the suite in the background has it ignore Ctrl-C, and so would the programs that tests stop.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def default_scope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the default scope that a test sets: the next one would look its types up in that library."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict(DefaultScope._instance_dict))
