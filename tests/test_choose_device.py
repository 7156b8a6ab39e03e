"""Which device an instance of the Triton backend runs on: decided without a GPU, so tested without one."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest

from mnist_preprocess import ROOT


@pytest.fixture
def backend(monkeypatch):
    """The backend's module outside Triton, which else provides pb_utils; it keeps the warnings."""
    pb_utils = ModuleType("triton_python_backend_utils")
    pb_utils.warnings = []
    pb_utils.Logger = SimpleNamespace(log_warn=pb_utils.warnings.append)
    pb_utils.Tensor = SimpleNamespace
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb_utils)
    spec = importlib.util.spec_from_file_location(
        "tensorflow_backend", ROOT / "scripts" / "triton" / "backends" / "tensorflow" / "model.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kind", "device_id", "gpus", "device"),
    [("CPU", 0, 2, None), ("MODEL", 0, 2, None), ("GPU", 0, 1, "/GPU:0"), ("GPU", 1, 2, "/GPU:1")],
)
def test_an_instance_runs_where_triton_places_it(backend, kind, device_id, gpus, device):
    assert backend.choose_device(kind, device_id, lambda: gpus) == device
    assert not backend.pb_utils.warnings


@pytest.mark.parametrize(("device_id", "gpus"), [(0, 0), (1, 1)])
def test_a_gpu_that_tensorflow_does_not_see_is_warned_of(backend, device_id, gpus):
    assert backend.choose_device("GPU", device_id, lambda: gpus) is None
    assert f"GPU {device_id} and TensorFlow sees {gpus} GPUs" in backend.pb_utils.warnings[0]


def test_tensorflow_is_not_imported_to_count_gpus_for_a_cpu(backend):
    assert backend.choose_device("CPU", 0, lambda: pytest.fail("counted")) is None
