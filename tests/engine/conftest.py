"""Make toy runs quick: no listing of compilers and libraries at the start of each."""

import pytest


@pytest.fixture(autouse=True)
def _no_environment_listing(monkeypatch):
    monkeypatch.setattr('mmengine.runner.runner.Runner._log_env', lambda self, env_cfg: None)
