import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test may reach for a network
os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels run on the CPU
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import common  # noqa: E402


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory):
    """A runs/ folder that holds the built-in starts, made once."""
    cache = tmp_path_factory.mktemp("runs")
    for name in common.TINIES:
        common.tiny_policy(name, cache)
    return cache


@pytest.fixture
def workdir(tmp_path, monkeypatch, tiny_cache):
    """An empty working folder, but that its runs/ already holds the built-in starts."""
    (tmp_path / "runs").mkdir()
    for folder in tiny_cache.glob("tiny-*"):
        (tmp_path / "runs" / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def one_thread():
    """Tensors are tiny here: a second thread only waits, and for long when the other core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
