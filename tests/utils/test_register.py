"""register_all_modules: what it imports, and what it does to the default scope."""

import warnings
from collections.abc import Iterator

import pytest
from mmengine.registry import DefaultScope

from boltz_mm.registry import MODELS
from boltz_mm.utils import register_all_modules


@pytest.fixture(autouse=True)
def _own_scopes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with DefaultScope.overwrite_default_scope(None):
        monkeypatch.setattr(DefaultScope, '_instance_dict', type(DefaultScope._instance_dict)())
        yield


def test_registers_without_scope() -> None:
    register_all_modules(init_default_scope=False)
    assert 'BoxeR' in MODELS.module_dict
    assert DefaultScope.get_current_instance() is None


def test_sets_the_scope_once() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        register_all_modules()
        register_all_modules()
    assert DefaultScope.get_current_instance().scope_name == 'boltz_mm'


def test_replaces_another_scope_with_a_warning() -> None:
    DefaultScope.get_instance('someone', scope_name='mmdet')
    with pytest.warns(UserWarning, match="'mmdet' is replaced by 'boltz_mm'"):
        register_all_modules()
    assert DefaultScope.get_current_instance().scope_name == 'boltz_mm'
