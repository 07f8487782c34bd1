"""Runs programs that a model wrote, where they can do no harm.

Each program is a process of its own, in namespaces of its own (user, mount, PID, network, IPC): it is nobody, sees no
network, reads files but writes none outside a small memory file system, and dies with all that it started. Limits hold
memory, CPU time, file size, open files and processes. Linux with user namespaces is needed; without, `isolated` says
why and nothing is run, unless the caller insists: then the limits alone hold, and a program may delete files.

A program has passed when it ran to its end: leaving early, by `sys.exit(0)` too, is a failure. One that sets out to
forge that verdict could; it could still do no harm.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence

MEGABYTE = 2**20
_TURN = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_seconds: int
    wall_seconds: float
    memory: int = 1024 * MEGABYTE  # address space
    files: int = 64 * MEGABYTE  # the memory file system, and any file
    processes: int = 32


# Runs in the child before the program. It gets the limits and the token on its standard input, and writes the token to
# descriptor 3 once the program has run to its end.
_CHILD = r"""
import ctypes, json, os, resource, signal, sys

order = json.loads(sys.stdin.buffer.readline())
program = sys.stdin.buffer.read()  # as it came, in UTF-8: what the locale makes of it would be another program
libc = ctypes.CDLL(None, use_errno=True)

def must(result, what):
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")

def enter():
    NOBODY, USER, MOUNT, PID, NET, IPC = 65534, 0x10000000, 0x20000, 0x20000000, 0x40000000, 0x8000000
    if os.getuid() == 0:  # nobody may not look into a home where Python is: it gets a view of its own
        must(libc.unshare(MOUNT), "unshare")
        must(libc.mount(None, b"/", None, 0x4000 | 0x40000, None), "mount private")
        python, view = os.fsencode(sys.base_prefix), os.fsencode(order["python"])
        must(libc.mount(python, view, None, 0x1000 | 0x4000, None), "mount bind")
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        libc.prctl(4, 1, 0, 0, 0)  # dumpable again, or /proc/self belongs to root
    uid, gid = os.getuid(), os.getgid()
    must(libc.unshare(USER | MOUNT | PID | NET | IPC), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    must(libc.mount(None, b"/", None, 0x4000 | 0x40000, None), "mount private")
    attributes = (ctypes.c_uint64 * 4)(1, 0, 0, 0)  # MOUNT_ATTR_RDONLY, on everything
    must(libc.syscall(442, -100, b"/", 0x8000, attributes, 32), "mount_setattr")
    size = f"size={order['files']},mode=777".encode()
    must(libc.mount(b"jail", os.fsencode(order["work"]), b"tmpfs", 2 | 4, size), "mount tmpfs")  # nosuid, nodev

prefix = sys.base_prefix
if order["isolated"]:
    prefix = order["python"] if os.getuid() == 0 else prefix
    enter()
    child = os.fork()  # the first process of the new PID namespace: all others die with it
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # die with the parent
libc.prctl(38, 1, 0, 0, 0)  # no new privileges
os.chdir(order["work"])
for limit, value in (
    (resource.RLIMIT_CPU, order["cpu"]), (resource.RLIMIT_AS, order["memory"]),
    (resource.RLIMIT_FSIZE, order["files"]), (resource.RLIMIT_NPROC, order["processes"]),
    (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(limit, (value, value))
with open("program.py", "wb") as file:
    file.write(program)
text = (
    "import os, sys\n"
    "code = compile(open('program.py', encoding='utf-8').read(), 'program.py', 'exec')\n"
    "exec(code, {'__name__': '__main__'})\n"
    "os.write(3, sys.argv[1].encode())"
)
python = f"{prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
os.execve(python, [python, "-I", "-c", text, order["token"]], {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"})
"""


def run_programs(programs: Sequence[str], limits: Limits, isolate: bool = True) -> list[bool]:
    """Whether each program runs to its end, in the order given; as many at once as there are CPUs.

    `isolate=False` leaves out the namespaces: only for programs that are trusted. Callers in several threads take
    turns, so that no program spends its seconds waiting for a CPU.
    """
    with _TURN, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda program: _run(program, limits, isolate)[0], programs))


@functools.cache
def isolated() -> str | None:
    """None where programs can be isolated, else why not."""
    passed, trouble = _run("pass", Limits(cpu_seconds=10, wall_seconds=60), True)
    return None if passed else trouble.strip().splitlines()[-1] if trouble.strip() else "no reason given"


def _run(program: str, limits: Limits, isolate: bool) -> tuple[bool, str]:
    """(whether it ran to its end, the end of what it or the jail wrote to standard error)."""
    token = secrets.token_hex(16)
    reader, writer = os.pipe()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        os.chmod(folder, 0o755)
        for name in ("python", "work"):
            os.mkdir(f"{folder}/{name}")
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", f"import os; os.dup2({writer}, 3)\n{_CHILD}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(writer,),
            start_new_session=True,
        )
        os.close(writer)
        try:
            process.communicate(_order(program, token, folder, limits, isolate), limits.wall_seconds)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            pass
        finally:
            _kill(process)
        os.set_blocking(reader, False)
        try:
            written = os.read(reader, 100)
        except BlockingIOError:
            written = b""
        os.close(reader)
        size = errors.seek(0, os.SEEK_END)
        errors.seek(max(0, size - 2000))
        return written == token.encode(), errors.read().decode("utf-8", "replace")


def _order(program: str, token: str, folder: str, limits: Limits, isolate: bool) -> bytes:
    order = {
        "isolated": isolate,
        "token": token,
        "work": f"{folder}/work",
        "python": f"{folder}/python",
        "cpu": limits.cpu_seconds,
        "memory": limits.memory,
        "files": limits.files,
        "processes": limits.processes,
    }
    return f"{json.dumps(order)}\n{program}".encode("utf-8", "surrogatepass")


def _kill(process: subprocess.Popen) -> None:
    """Ends a program's session; the end of its first process ends its PID namespace."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
