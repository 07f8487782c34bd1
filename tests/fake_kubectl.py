"""`kubectl` as far as the launcher uses it: flags as in kubectl_flags.json, a cluster of processes on this machine.

In the folder FAKE_KUBECTL: `says` is an error that every command ends with, `calls` what was asked, `objects/` what was
created, `logs/` the output of pods. A JobSet has controllers (fake_cluster.py) while it is there: in `states/` is what
they made of it, in `asked/` what they are to do. `nodes`, `image`, `warnings` are what a test wants of the cluster.
"""

import base64
import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from typing import Any

FACTS = json.loads(pathlib.Path(__file__).with_name("kubectl_flags.json").read_text())["commands"]
CLUSTER = pathlib.Path(__file__).with_name("fake_cluster.py")


def main() -> None:
    folder = pathlib.Path(os.environ["FAKE_KUBECTL"])
    verb, names, flags = parsed(sys.argv[1:])
    with (folder / "calls").open("a") as calls:
        calls.write(" ".join(sys.argv[1:]) + "\n")
    if (folder / "says").exists():
        sys.exit((folder / "says").read_text())
    if verb == "config current-context":
        print("the-cluster")
    elif verb == "create":
        create(folder, read(sys.stdin.read()), flags["--output"])
    elif verb == "get events":
        print((folder / "warnings").read_text() if (folder / "warnings").exists() else '{"items": []}')
    elif verb == "get secret":
        held = json.loads((folder / "objects" / f"Secret.{names[0]}").read_text())["stringData"]
        print(json.dumps({"data": {name: base64.b64encode(value.encode()).decode() for name, value in held.items()}}))
    elif verb.startswith("get"):
        show(folder, flags["--selector"])
    elif verb == "logs":
        follow(folder, names[0])
    elif verb == "exec":
        execute(folder, names[0], sys.argv[sys.argv.index("--") + 1 :])
    else:
        ask(folder, names, flags)


def parsed(words: list[str]) -> tuple[str, list[str], dict[str, str | None]]:
    """(verb, names, flags) of a command line; ends with kubectl's status for a wrong one."""
    words = words[: words.index("--")] if "--" in words else words
    plain = [word for word in words if not word.startswith("-")]
    verb = next((verb for verb in FACTS if plain[: len(verb.split())] == verb.split()), None)
    if verb is None:
        sys.exit(f"error: unknown command {words}")
    facts, names = FACTS[verb], plain[len(verb.split()) :]
    flags = {flag: value if given else None for flag, given, value in map(split, words) if flag.startswith("-")}
    wrong = [flag for flag in flags if flag not in facts["required"] + facts["optional"]]
    wrong += [flag for flag in flags if (flags[flag] is None) != (flag in facts["bare"])]
    missing = [flag for flag in facts["required"] if flag not in flags]
    if wrong or missing or len(names) != facts["names"]:
        sys.exit(f"error: wrong command line: {wrong} {missing} {names}")
    return verb, names, flags


def split(word: str) -> tuple[str, str, str]:
    return word.partition("=")


def read(text: str) -> list[dict]:
    """The objects of a YAML text, of which JSON is a kind."""
    if text.startswith("{"):
        return json.loads(text)["items"]
    import yaml  # the only one that needs a library

    return list(yaml.load_all(text, yaml.CSafeLoader))


def create(folder: pathlib.Path, entries: list[dict], output: str) -> None:
    for name in ("objects", "states"):
        (folder / name).mkdir(exist_ok=True)
    for entry in entries:
        path = folder / "objects" / f"{entry['kind']}.{entry['metadata']['name']}"
        if path.exists():
            sys.exit(f'Error from server (AlreadyExists): "{entry["metadata"]["name"]}" already exists')
        entry["metadata"]["uid"] = f"uid-{time.monotonic_ns()}"
        (folder / "states" / path.name).unlink(missing_ok=True)  # of an earlier one
        write(path, entry)
        if entry["kind"] == "JobSet":
            # The cluster goes on without whoever asked it.
            with (folder / "controllers").open("ab") as log:
                subprocess.Popen(
                    [sys.executable, "-S", CLUSTER, folder, path.name],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
                )  # fmt: skip
        print(json.dumps(entry) if output == "json" else f"{entry['kind'].lower()}/{entry['metadata']['name']}")


def show(folder: pathlib.Path, selector: str) -> None:
    """Prints the JobSets and pods with a label; a JobSet as it was created until its controllers have seen it."""
    items = []
    for jobset in (folder / "objects").glob("JobSet.*") if (folder / "objects").exists() else ():
        for path in (folder / "states" / jobset.name, jobset):
            with contextlib.suppress(FileNotFoundError):
                found = json.loads(path.read_text())
                items += found if isinstance(found, list) else [found]
                break
    print(json.dumps({"items": [item for item in items if labelled(item, selector)]}))


def labelled(item: dict, selector: str) -> bool:
    name, _, value = selector.partition("=")
    return item["metadata"]["labels"][name] == value


def follow(folder: pathlib.Path, pod: str) -> None:
    """Prints a pod's output until its process has ended."""
    with (folder / "logs" / pod).open("rb") as log:
        while True:
            over = (folder / "logs" / f"{pod}.over").exists()
            sys.stdout.buffer.write(log.read())
            sys.stdout.flush()
            if over:
                return
            time.sleep(0.05)


def execute(folder: pathlib.Path, pod: str, command: list[str]) -> None:
    """Runs a shell's command in a pod, whose first process has another number here."""
    first = (folder / "pids" / pod).read_text()
    sys.exit(subprocess.run([*command[:-1], re.sub(r"\b1$", first, command[-1])], check=False).returncode)


def ask(folder: pathlib.Path, names: list[str], flags: dict[str, str | None]) -> None:
    """Leaves an order for the controllers of a JobSet, or of those whose pods have a label."""
    jobsets = [f"JobSet.{name}" for name in names]
    if not names:
        found = {path.name: json.loads(path.read_text()) for path in (folder / "objects").glob("JobSet.*")}
        jobsets = [name for name, jobset in found.items() if labelled(jobset, flags["--selector"])]
    for name in jobsets:
        path = folder / "asked" / name / f"{time.monotonic_ns()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, {"delete": bool(names), "now": "--now" in flags})


def write(path: pathlib.Path, content: Any) -> None:
    new = path.parent.parent / f"{path.name}.{os.getpid()}.new"  # where nobody looks
    new.write_text(json.dumps(content))
    new.rename(path)


if __name__ == "__main__":
    main()
