"""`gcloud compute tpus` as far as the launcher uses it: flags as in gcloud_flags.json, hosts that are folders here.

In the folder FAKE_GCLOUD: `state` is the queued resource's (none: there is no such one), `says` an error that every
command ends with, `becomes` what one becomes that is asked for, a line each time (ACTIVE without it), `error` what
FAILED is described with, `slow` a verb and how many seconds its answer takes once Google has heard it, as `heard` says,
`NODE.WORKER.is` that a host is down, hangs, or starts no process, `calls` what was asked, `port` where the processes of
a job meet, as a TPU's metadata has it.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

FACTS = json.loads(pathlib.Path(__file__).with_name("gcloud_flags.json").read_text())["commands"]


def main() -> None:
    folder = pathlib.Path(os.environ["FAKE_GCLOUD"])
    assert sys.argv[1:3] == ["compute", "tpus"], sys.argv
    verb, name, flags = " ".join(sys.argv[3:5]), sys.argv[5], dict(map(split, sys.argv[6:]))
    check(verb, flags)
    with (folder / "calls").open("a") as calls:
        calls.write(" ".join(sys.argv[3:]) + "\n")
    if (folder / "says").exists():
        sys.exit((folder / "says").read_text())
    state = folder / "state"
    if verb == "queued-resources create":
        if state.exists():
            sys.exit("ERROR: ALREADY_EXISTS")
        (folder / "slices").write_text(flags.get("--node-count", "1"))
        (folder / "type").write_text(flags["--accelerator-type"])
        state.write_text("WAITING_FOR_RESOURCES")
        answer(folder, verb)
    elif not state.exists():
        sys.exit(f"ERROR: (gcloud.compute.tpus.{verb.replace(' ', '.')}) NOT_FOUND: Resource '{name}' was not found")
    elif verb == "queued-resources describe":
        failed = state.read_text() == "FAILED"
        data = {"failedData": {"error": json.loads((folder / "error").read_text())}} if failed else {}
        print(json.dumps({"name": name, "state": {"state": state.read_text(), **data}}))
        if state.read_text() == "WAITING_FOR_RESOURCES":
            state.write_text(next_state(folder / "becomes"))
    elif verb == "queued-resources delete":
        answer(folder, verb)
        state.unlink()
    elif verb == "tpu-vm describe":
        addresses = [{"ipAddress": f"10.0.0.{worker}"} for worker in range(workers(folder))]
        print(json.dumps({"networkEndpoints": addresses}))
    else:
        sys.exit(on_host(folder, name, int(flags["--worker"]), flags["--command"]))


def answer(folder: pathlib.Path, verb: str) -> None:
    slow, seconds = (folder / "slow").read_text().split() if (folder / "slow").exists() else ("none", "0")
    if slow == verb.split()[1]:
        (folder / "heard").write_text(verb)
        time.sleep(float(seconds))


def split(word: str) -> tuple[str, str | None]:
    flag, given, value = word.partition("=")
    return flag, value if given else None


def check(verb: str, flags: dict[str, str | None]) -> None:
    """Ends with gcloud's status for a wrong command line."""
    facts = FACTS[verb]
    known = {*facts["required"], *facts["optional"], *facts.get("one of", ())}
    wrong = [flag for flag in flags if flag not in known or (flags[flag] is None) != (flag in facts["bare"])]
    missing = [flag for flag in facts["required"] if flag not in flags]
    if wrong or missing or sum(flag in flags for flag in facts.get("one of", ())) != ("one of" in facts):
        print(f"ERROR: (gcloud) wrong command line: {wrong} {missing} {flags}", file=sys.stderr)
        sys.exit(2)


def next_state(path: pathlib.Path) -> str:
    first, *rest = path.read_text().split() if path.exists() else ["ACTIVE"]
    path.write_text("\n".join(rest or ["ACTIVE"]))
    return first


def workers(folder: pathlib.Path) -> int:
    """Hosts of a slice: one of v6e-8, two of any other type."""
    return 1 if (folder / "type").exists() and (folder / "type").read_text() == "v6e-8" else 2


def on_host(folder: pathlib.Path, node: str, worker: int, script: str) -> int:
    """Runs a line of shell on a worker; it is not ours, and outlives us unless it sees to its end itself."""
    state = folder / f"{node}.{worker}.is"
    how = state.read_text() if state.exists() else ""
    if how == "down":
        print("ssh: connect to host 10.0.0.1 port 22: Connection timed out", file=sys.stderr)
        return 255
    if how == "hangs" or (how == "starts no process" and "launch.keeper" in script):
        time.sleep(1000)
    slices = int((folder / "slices").read_text())
    index = (int(node.rpartition("-")[2]) if slices > 1 else 0) * workers(folder) + worker
    home = folder / f"{node}.{worker}"
    home.mkdir(exist_ok=True)
    job = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{(folder / 'port').read_text()}", "JAX_PROCESS_ID": str(index)}
    job |= {"JAX_NUM_PROCESSES": str(slices * workers(folder)), "HOME": str(home)}
    return subprocess.run(["sh", "-c", script], env={**os.environ, **job}, start_new_session=True).returncode


if __name__ == "__main__":
    main()
