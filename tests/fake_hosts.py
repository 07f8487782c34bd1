"""Hosts for the launcher that are folders of this machine, and what runs on them instead of training."""

import os
import pathlib
import subprocess
import sys
import textwrap

from launch import ship

ROOT = pathlib.Path(__file__).resolve().parent.parent

# As OpenSSH's client: the host stands before the line of shell; a host that is down gives 255, one that hangs nothing.
# What runs there is not ours: it outlives who started it unless it sees to its end itself.
SSH = r"""#!/bin/sh
printf '%s\n' "$*" >> "{folder}/calls"
for script; do host=$name; name=$script; done
case $(cat "{folder}/$host.is" 2>/dev/null) in
down) echo "ssh: connect to host $host port 22: Connection refused" >&2; exit 255;;
hangs) exec sleep 1000;;
esac
mkdir -p "{folder}/$host"
HOME="{folder}/$host" setsid sh -c "$script"
"""

# A Python that runs a program of the test's instead of ctllm.
PYTHON = """#!/bin/sh
case "$2" in
ctllm_jax.cli) shift 2; exec {python} -S {folder}/program.py "$@";;
*) exec {python} "$@";;
esac
"""

# A Python that makes environments; their pip writes down what is asked of it, and that its source is there.
PYTHON3 = """#!/bin/sh
test "$2" = venv || exec {python} "$@"
mkdir -p "$3/bin"
cat > "$3/bin/python" <<'END'
#!/bin/sh
test "$2" = pip || exec {folder}/venv/bin/python "$@"
echo "$@" >> "$HOME/pip"
for last; do :; done
test "$3" = uninstall || test -f "${{last%[*}}/setup.py"
END
chmod +x "$3/bin/python"
"""


class Hosts:
    """Fake hosts below a folder, each with its home there, and a launcher that ships a small checkout.

    `environment` is what `--environment` is given.
    """

    def __init__(self, folder: pathlib.Path, monkeypatch):
        folder.mkdir()
        self.folder, self.environment, self.checkout = folder, folder / "venv", repository(folder / "checkout")
        monkeypatch.setattr(sys, "argv", ["ctllm"])
        monkeypatch.setattr(ship, "checkout", lambda: self.checkout)
        monkeypatch.chdir(self.checkout)
        (self.environment / "bin").mkdir(parents=True)
        self._executable(folder / "bin" / "ssh", SSH.format(folder=folder))
        self._executable(self.environment / "bin" / "python", PYTHON.format(python=sys.executable, folder=folder))
        self._executable(folder / "bin" / "python3", PYTHON3.format(python=sys.executable, folder=folder))
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("CTLLM_JOBS", str(folder / "jobs"))

    def program(self, text: str) -> None:
        """What runs on the hosts; finds FOLDER and INDEX, its number in the job."""
        head = f'import os, pathlib, signal, sys, time\nFOLDER = pathlib.Path("{self.folder}")\n'
        head += 'INDEX = os.environ.get("JAX_PROCESS_ID", "0")\n'
        (self.folder / "program.py").write_text(head + textwrap.dedent(text))

    def becomes(self, host: str, state: str) -> None:
        (self.folder / f"{host}.is").write_text(state)

    def calls(self) -> str:
        return (self.folder / "calls").read_text() if (self.folder / "calls").exists() else ""

    @staticmethod
    def _executable(path: pathlib.Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)


def repository(folder: pathlib.Path) -> pathlib.Path:
    """A small checkout with what a host needs of ours, committed."""
    files = {"setup.py": b"", "requirements.lock": b"", ".gitignore": b"runs/\n__pycache__/\n"}
    names = [f"launch/{name}.py" for name in ("__init__", "hide", "keeper", "lines", "task")]
    names += [f"ctllm_jax/common/{name}.py" for name in ("children", "errors", "status")]
    for name in [*names, "configs/pretrain.py"]:
        files[name] = (ROOT / name).read_bytes()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=first")
    return folder


def git(folder: pathlib.Path, *arguments: str) -> str:
    author = ("-c", "user.name=test", "-c", "user.email=test@example.com")
    return subprocess.run(["git", "-C", folder, *author, *arguments], check=True, capture_output=True, text=True).stdout
