"""Every test sees eight virtual CPU devices; slow tests (`-m slow`) run in `make test-slow` only."""

import os
import pathlib
import signal

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

# A shell that starts the tests in the background has them ignore these, and so would the programs that the tests start
# and stop; a handler of ours is not inherited.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Real data beside the repository; tests that read it skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture(scope="session", autouse=True)
def compiled_by_children(tmp_path_factory):
    """What one program that a test starts has compiled, the next ones find; this process is past reading it. Records of
    launched jobs stay among the tests' files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "compiled"))
        patch.setenv("CTLLM_JOBS", str(tmp_path_factory.getbasetemp() / "jobs"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield
