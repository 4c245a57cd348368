from types import SimpleNamespace

import pytest
import torch

from boltz_mm.ops._registration import alert_not_deterministic

ON_CUDA = SimpleNamespace(device=torch.device('cuda', 0))


@pytest.fixture(autouse=True)
def restore():
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def test_silent_unless_asked_for(recwarn):
    torch.use_deterministic_algorithms(False)
    alert_not_deterministic('box_attention', ON_CUDA)
    assert not recwarn


def test_silent_on_cpu(recwarn):
    torch.use_deterministic_algorithms(True)
    alert_not_deterministic('box_attention', torch.zeros(1))
    assert not recwarn


def test_error_names_the_operator():
    torch.use_deterministic_algorithms(True)
    with pytest.raises(RuntimeError, match='boltz_mm::box_attention has no deterministic implementation on CUDA'):
        alert_not_deterministic('box_attention', ON_CUDA)


def test_warning_only():
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match='boltz_mm::deform_attention'):
        alert_not_deterministic('deform_attention', ON_CUDA)
