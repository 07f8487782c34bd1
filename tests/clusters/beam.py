"""Beam job services on this machine: Beam's own in Python, Prism, and Flink with two task managers.

`PYTHONPATH=.:tests python -m clusters.beam KIND COMMAND ...` runs a command while one is there, with workers in the
processes of a pool. BEAM_RUNNER and BEAM_OPTIONS are what the command gives to --config.beam.runner and
--config.beam.options. What a kind needs is first installed into a cache (CTLLM_CLUSTERS, else ~/.cache/ctllm-clusters):

service  Beam's Python job service; nothing to install
prism    built from Beam's Go module by `go install`, which checks it against Go's checksum database
flink    Flink from PyPI (its jars), Beam's job server for it from Maven Central (MAVEN_REPOSITORY names
         another repository), checked against the SHA-1 beside it; both need Java
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator

import apache_beam
from clusters.sshd import free_port, wait_for_port

ROOT = pathlib.Path(__file__).resolve().parents[2]
BIN = pathlib.Path(sys.executable).parent
FLINK = "1.20.5"  # of a line that Beam's job server is published for
FLINK_SHA256 = "e6aee62ea1a1fe7b32e28894ad079f3f1a50a372a4caac3df52405267f4228c8"
MAVEN = "https://repo.maven.apache.org/maven2"
TASK_MANAGERS = 2
JOB_MANAGER = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
TASK_MANAGER = "org.apache.flink.runtime.taskexecutor.TaskManagerRunner"
OPENED = ("java.lang", "java.net", "java.io", "java.nio", "java.text", "java.time", "java.util", "java.util.concurrent")


class Unavailable(Exception):
    """What cannot be had here, and why."""


@contextlib.contextmanager
def running(kind: str, folder: pathlib.Path) -> Iterator[dict[str, str]]:
    """BEAM_RUNNER and BEAM_OPTIONS of a job service with a pool of workers; all is gone when the block ends.

    Raises Unavailable if what it needs is not here and cannot be installed."""
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        endpoint = {"service": _service, "prism": _prism, "flink": _flink}[kind](folder, stack)
        pool = free_port()
        _start([sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={pool}"],
               folder / "pool.log", stack)  # fmt: skip
        wait_for_port(pool, 120)
        options = [
            f"--job_endpoint={endpoint}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{pool}",
        ]
        if kind == "flink":
            options.append(f"--parallelism={TASK_MANAGERS}")
        yield {"BEAM_RUNNER": "PortableRunner", "BEAM_OPTIONS": repr(tuple(options))}


def _service(folder: pathlib.Path, stack: contextlib.ExitStack) -> str:
    port = free_port()
    command = [sys.executable, "-m", "apache_beam.runners.portability.local_job_service_main", f"--port={port}"]
    _start([*command, f"--staging_dir={folder / 'staging'}"], folder / "service.log", stack)
    wait_for_port(port, 120)
    return f"localhost:{port}"


def _prism(folder: pathlib.Path, stack: contextlib.ExitStack) -> str:
    port = free_port()
    command = [install_prism(), f"--job_port={port}", "--serve_http=false"]
    _start(command, folder / "prism.log", stack)
    wait_for_port(port, 120)
    return f"localhost:{port}"


def _flink(folder: pathlib.Path, stack: contextlib.ExitStack) -> str:
    jar = install_job_server()  # the smaller half, and the one that may be missing
    rest = flink_cluster(folder, stack)
    port, artifacts = free_port(), folder / "artifacts"
    command = ["java", "-jar", jar, f"--flink-master=localhost:{rest}", f"--job-port={port}", "--artifact-port=0"]
    _start([*command, "--expansion-port=0", f"--artifacts-dir={artifacts}"], folder / "job_server.log", stack)
    wait_for_port(port, 120)
    return f"localhost:{port}"


def flink_cluster(folder: pathlib.Path, stack: contextlib.ExitStack) -> int:
    """A job manager and two task managers of a slot each; the port of their REST interface."""
    home, rest = install_flink(), free_port()
    (folder / "conf").mkdir(parents=True)
    settings = {
        "jobmanager.rpc.address": "localhost",
        "jobmanager.rpc.port": free_port(),
        "rest.address": "localhost",
        "rest.port": rest,
        "taskmanager.host": "localhost",
        "taskmanager.numberOfTaskSlots": 1,
        "io.tmp.dirs": folder,
        # Flink's scripts, which PyPI's package lacks, work these out from the size of a process.
        "taskmanager.cpu.cores": 1.0,
        "taskmanager.memory.task.heap.size": "384m",
        "taskmanager.memory.task.off-heap.size": "0m",
        "taskmanager.memory.managed.size": "128m",
        "taskmanager.memory.network.min": "64m",
        "taskmanager.memory.network.max": "64m",
        "taskmanager.memory.framework.heap.size": "128m",
        "taskmanager.memory.framework.off-heap.size": "128m",
        "taskmanager.memory.jvm-metaspace.size": "256m",
        "taskmanager.memory.jvm-overhead.min": "192m",
        "taskmanager.memory.jvm-overhead.max": "192m",
    }
    (folder / "conf" / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    console = "rootLogger.level=INFO\nrootLogger.appenderRef.c.ref=C\nappender.c.type=CONSOLE\nappender.c.name=C\n"
    console += "appender.c.layout.type=PatternLayout\nappender.c.layout.pattern=%d %p %c{1} %m%n\n"
    (folder / "conf" / "log4j.properties").write_text(console)
    java = ["java", "-Xmx640m", f"-Dlog4j.configurationFile={folder / 'conf' / 'log4j.properties'}"]
    java += [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in OPENED] + ["-cp", f"{home / 'lib'}/*"]
    for number, program in enumerate([JOB_MANAGER] + [TASK_MANAGER] * TASK_MANAGERS):
        log = folder / f"{program.rpartition('.')[2]}{number}.log"
        _start([*java, program, "--configDir", folder / "conf"], log, stack)
    for _ in range(120):
        with contextlib.suppress(OSError, ValueError):
            with urllib.request.urlopen(f"http://localhost:{rest}/overview", timeout=5) as answer:
                if json.load(answer)["taskmanagers"] == TASK_MANAGERS:
                    return rest
        time.sleep(1)
    raise AssertionError("Flink did not come up\n" + "\n".join(p.read_text()[-2000:] for p in folder.glob("*.log")))


def _start(command: list, log: pathlib.Path, stack: contextlib.ExitStack) -> None:
    """Starts a program of its own session, which is ended with all its children."""
    # Workers of a pool are started as `python`, which must be this one, and import this checkout.
    environment = {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    file = stack.enter_context(log.open("w"))
    program = subprocess.Popen(
        command, stdout=file, stderr=file, cwd=ROOT, env={**os.environ, **environment},
        start_new_session=True,
    )  # fmt: skip
    stack.callback(_end, program)


def _end(program: subprocess.Popen) -> None:
    for number in (15, 9):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(program.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            program.wait(10)


def cache() -> pathlib.Path:
    """Where installed programs stay from one run to the next."""
    folder = pathlib.Path(os.environ.get("CTLLM_CLUSTERS") or "~/.cache/ctllm-clusters").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def install_prism() -> pathlib.Path:
    """The Prism of the installed Beam."""
    version = apache_beam.__version__
    program = cache() / f"prism-{version}" / "prism"
    if not program.exists():
        go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
        if not go:
            raise Unavailable("Go is not installed")
        _install([go, "install", f"github.com/apache/beam/sdks/v2/go/cmd/prism@v{version}"], GOBIN=str(program.parent))
    return program


def install_flink() -> pathlib.Path:
    """Flink's folder, with lib."""
    folder = cache() / f"flink-{FLINK}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as place:
            wanted = pathlib.Path(place, "requirements.txt")
            wanted.write_text(f"apache-flink-libraries=={FLINK} --hash=sha256:{FLINK_SHA256}\n")
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
            _install([*command, "--requirement", wanted, "--target", f"{place}/flink"])
            os.rename(f"{place}/flink", folder)
    return folder / "pyflink"


def install_job_server() -> pathlib.Path:
    """Beam's job server for this line of Flink."""
    if not shutil.which("java"):
        raise Unavailable("Java is not installed")
    name = f"beam-runners-flink-{FLINK.rpartition('.')[0]}-job-server"
    jar = cache() / f"{name}-{apache_beam.__version__}.jar"
    if not jar.exists():
        repository = os.environ.get("MAVEN_REPOSITORY") or MAVEN
        url = f"{repository}/org/apache/beam/{name}/{apache_beam.__version__}/{jar.name}"
        temporary = jar.with_suffix(".tmp")
        try:
            with urllib.request.urlopen(f"{url}.sha1", timeout=60) as answer:
                wanted = answer.read(1000).decode().split()[0]
            with urllib.request.urlopen(url, timeout=60) as answer, temporary.open("wb") as file:
                shutil.copyfileobj(answer, file)
        except OSError as error:
            raise Unavailable(f"{url}: {error}") from error
        with temporary.open("rb") as file:
            found = hashlib.file_digest(file, "sha1").hexdigest()
        if found != wanted:
            raise Unavailable(f"{url}: its SHA-1 is {found}, not {wanted}")
        temporary.rename(jar)
    return jar


def _install(command: list, **variables: str) -> None:
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(map(str, command))}: {done.stderr.strip()[-1000:]}")


if __name__ == "__main__":
    try:
        with tempfile.TemporaryDirectory() as place, running(sys.argv[1], pathlib.Path(place) / "beam") as found:
            sys.exit(subprocess.run(sys.argv[2:], env={**os.environ, **found}, check=False).returncode)
    except Unavailable as error:
        sys.exit(str(error))
