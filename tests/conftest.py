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
def tiny(tmp_path_factory):
    """The folder of a `tiny` that was trained for a fifth of the steps: a start, not a good one."""
    return common.make_tiny(tmp_path_factory.mktemp("cache") / "tiny", steps=60)


@pytest.fixture
def workdir(tmp_path, monkeypatch, tiny):
    """An empty working folder in which --model tiny is there already."""
    (tmp_path / common.CACHE).mkdir(parents=True)
    (tmp_path / common.CACHE / "tiny").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    return tmp_path
