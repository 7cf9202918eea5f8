import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach for a network
if "ON_CUDA" not in os.environ:  # set by test_cuda.py for itself; all other tests are of the CPU, also beside a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels run on the CPU
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "claims")]

import pytest  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402

torch.set_num_threads(1)  # tensors are tiny here: a second thread only waits, and for long when the other core is busy


@pytest.fixture(scope="session")
def tiny():
    """The folder of `tiny`."""
    return Path(common.MODELS["tiny"])


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
