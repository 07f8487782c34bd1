"""Target `slurm`: a batch job, submitted where `sbatch` is, on nodes that share the home folder with that machine.

JAX's own look at SLURM would give each process a single device of its node; here a process has all that SLURM gives
it, as on a TPU host, so the addresses are set. `--sbatch` hands on what only the site knows: partition, GPUs, time.
"""

import pathlib
import shlex
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from ctllm_jax.common.errors import UserError
from ctllm_jax.common.files import write_atomic
from ctllm_jax.verbs import Option
from launch import hosts, resumes, view
from launch.held import DETACH
from launch.hosts import Host, Plan
from launch.jobs import Job, State, jobs_folder, new_id
from launch.process import say
from launch.target import Payload, Target

_ANSWER = 60  # seconds that a command of SLURM may take
_ALIVE = "PENDING CONFIGURING RUNNING SUSPENDED COMPLETING REQUEUED REQUEUE_HOLD SIGNALING STAGE_OUT RESIZING".split()
_KEPT = "HOME USER PATH LANG SHELL".split()  # what a job has of our environment, besides what is forwarded

# The job's shell script. Tasks (`launch.task`) note how they ended in `$statuses`: srun's own status does not tell who
# failed.
_BODY = r"""
set -u
job={job}
statuses=$job.statuses
failures=0
attempt=0
stopping=
again=
status=75
shorts=$(cat "$job.shorts" 2> /dev/null || echo 0) # lives in a row, also before a time in the queue

end() {{
  echo "launch: ended with status $1"
  if [ ! -e "$job.end" ]; then echo "$1" > "$job.end.new" && mv "$job.end.new" "$job.end"; fi
  exit "$1"
}}
ask() {{ # why; the processes, not this script, are asked to save and end
  stopping=$1
  again=yes
  scancel --signal=TERM "$SLURM_JOB_ID"
}}
settle() {{ # returns only where all processes are to be started again
  if [ "$status" -eq 0 ] || [ "$status" -eq 2 ] || [ "$stopping" = cancel ] || [ -e "$job.end" ]; then
    end "$status"
  fi
  if [ "$stopping" = limit ]; then
    # SLURM sends the same signal when somebody cancels the job; then it does not run any more.
    if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then end "$status"; fi
    echo "launch: the time is over (status $status); back to the queue"
    scontrol requeue "$SLURM_JOB_ID"
    exit "$status"
  fi
}}
trap 'ask limit' TERM
trap 'ask cancel' USR1
rm -f "$job.end" # of an earlier time in the queue

mkdir -p {folder}
cd {folder} || end 2
# srun does not take this over by itself; a process would have a single CPU.
if [ -n "${{SLURM_CPUS_PER_TASK:-}}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
JAX_COORDINATOR_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export JAX_NUM_PROCESSES={processes} PYTHONPATH={source} PYTHONUNBUFFERED=1{variables}
host=$JAX_COORDINATOR_ADDRESS
while :; do
  settle # it may have been asked to stop while nothing ran
  rm -f "$statuses"
  began=$SECONDS
  export JAX_COORDINATOR_ADDRESS=$host:$((20000 + (SLURM_JOB_ID * 16 + attempt) % 12000))
  attempt=$((attempt + 1))
  srun --label --export=ALL --kill-on-bad-exit=1 {python} -m launch.task "$statuses" {secrets} \
    {command} &
  step=$!
  again=yes
  while [ -n "$again" ]; do # a signal to this script ends the waiting, not the step
    again=
    wait "$step"
    code=$?
    if [ "$code" -ne 127 ]; then status=$code; fi
  done
  # Who failed by itself counts; 69, 134 and 143 are the echoes of another one's end.
  failed=$(grep -vxE -m 1 '0|75|69|134|143' "$statuses" 2> /dev/null ||
    grep -xE -m 1 '69|134|143' "$statuses" 2> /dev/null)
  if [ -n "$failed" ]; then
    status=$failed
  elif [ "$status" -eq 0 ] && grep -qx 75 "$statuses"; then
    status=75
  fi

  if [ "$status" -eq 75 ] && [ "$stopping" != cancel ]; then
    shorts=$((SECONDS - began < {short} ? shorts + 1 : 0))
    echo "$shorts" > "$job.shorts"
    if [ "$shorts" -ge {most} ]; then
      echo "launch: {given_up}"
      end 1
    fi
  fi
  settle
  if [ "$status" -ne 75 ]; then
    echo "launch: the step ended with status $status"
    if [ "$failures" -ge {restarts} ]; then
      echo "launch: {restarts} restarts are used up"
      end "$status"
    fi
    failures=$((failures + 1))
    echo "launch: starting all processes again (restart $failures of {restarts})"
  else
    echo "launch: starting all processes again"
  fi
  row=$((failures > shorts ? failures : shorts))
  sleep $((row > 5 ? {longest} : 1 << row)) & wait $!
done
"""


def run(payload: Payload, options: Mapping[str, Any], dry_run: bool) -> int:
    """Submits the payload and shows its output; see `Target`.

    Raises:
      UserError: a number is out of range, SLURM refuses or does not answer, what `launch.hosts` raises.
    """
    for name, least in (("nodes", 1), ("per_node", 1), ("save_seconds", 1)):
        if options[name] < least:
            raise UserError(f"launch slurm: --{name}={options[name]}: must be at least {least}")
    count = options["nodes"] * options["per_node"]
    if count > 1 and not payload.distributed:
        raise UserError(f"launch slurm: {payload.verb} runs in one process, not in {count}: give --nodes=1")
    plan, here = hosts.plan(payload, options), [Host("this machine", lambda script: ("sh", "-c", script))]
    job_id = new_id(payload.verb)
    path = jobs_folder() / f"{job_id}.sbatch"
    command = ["sbatch", "--parsable", *shlex.split(options["sbatch"]), str(path)]
    text = script(plan, options, jobs_folder() / job_id)
    if dry_run:
        print(hosts.describe_set_up(plan, here), f"# {path}", text, shlex.join(command), sep="\n")
        return 0
    hosts.set_up(plan, here, say)
    write_atomic(path, text)
    number = _slurm(command, "`sinfo` shows partitions and what is free").split(";")[0].strip()
    words = (payload.verb, *payload.arguments)
    job = Job(job_id, "slurm", words, plan.place.code.revision, time.time(), {"job": number})
    job.save()
    say(f"job {job_id} is SLURM's {number}; it goes on without this terminal: `ctllm launch attach {job_id}`")
    return 0 if options["detach"] else view.follow(job, TARGET)


def script(plan: Plan, options: Mapping[str, Any], job: pathlib.Path) -> str:
    """The batch script; `job` is the path of the job's files without their endings."""
    place, home = plan.place, pathlib.Path.home()
    source, count = home / place.source, options["nodes"] * options["per_node"]
    heads = {
        "job-name": f"ctllm-{plan.payload.verb}",
        "nodes": options["nodes"],
        "ntasks-per-node": options["per_node"],
        "output": f"{job}.log",
        "open-mode": "append",
        "signal": f"B:TERM@{options['save_seconds']}",
        "export": ",".join([*_KEPT, *plan.secrets]),
    }
    lines = ["#!/bin/bash", *(f"#SBATCH --{name}={value}" for name, value in heads.items()), "#SBATCH --requeue"]
    python = home / place.interpreter
    words = [python, "-m", "ctllm_jax.cli", plan.payload.verb]
    words += [f"--config={source}/{plan.config}"] if plan.config else []
    words += [*plan.arguments, *(["--config.distributed=True"] if count > 1 else [])]
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options["devices"])} if options["devices"] else {}
    variables = "".join(f" {name}={shlex.quote(value)}" for name, value in {**plan.variables, **devices}.items())
    body = _BODY.format(
        job=shlex.quote(str(job)),
        folder=shlex.quote(str(home / options["folder"])),
        processes=count,
        source=shlex.quote(str(source)),
        variables=variables,
        python=shlex.quote(str(python)),
        secrets=shlex.quote(",".join(plan.secrets)),
        command=shlex.join(map(str, words)),
        restarts=options["restarts"],
        short=int(resumes.SHORT),
        most=resumes.MOST,
        longest=int(resumes.LONGEST_PAUSE),
        given_up=resumes.given_up(),
    )
    return "\n".join(lines) + "\n" + body


def state(job: Job) -> State:
    """As SLURM has it while it knows the job, and as the script wrote it down when it ended."""
    end = jobs_folder() / f"{job.id}.end"
    number = job.handle["job"]
    if not end.exists():
        command = ["squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T %r"]
        found = _slurm(command, "", allowed="Invalid job id").split()
        name = found[0] if found else "no longer known"
        if name in _ALIVE:
            return State(f"{name.lower()}, SLURM's {number}" + (f" ({found[1]})" if name == "PENDING" else ""))
        if not end.exists():
            return State(f"SLURM's {number}: {name.lower()}", 1)
    status = int(end.read_text())
    return State("done" if status == 0 else f"ended with status {status}", status)


def cancel(job: Job, now: bool) -> None:
    """Asks the job's script to let its processes save; `now`, or before it has begun, has SLURM end it."""
    number = job.handle["job"]
    if now or state(job).text.startswith("pending"):
        write_atomic(jobs_folder() / f"{job.id}.end", "143\n")  # whatever the script is about to do
        _slurm(["scancel", number], "")
    else:
        _slurm(["scancel", "--batch", "--signal=USR1", number], "")


def profile(job: Job) -> None:
    """Tells the tasks, which ask those processes that know how; the signal harms no other one."""
    _slurm(["scancel", "--signal=URG", job.handle["job"]], "")


def _slurm(command: list[str], hint: str, allowed: str = "no such error") -> str:
    """What a command of SLURM prints.

    Raises:
      UserError: there is none, it fails (but for an error that is `allowed`), it does not answer.
    """
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER, check=False)
    except FileNotFoundError:
        raise UserError(f"launch slurm: no {command[0]} here; run this where jobs are submitted") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"launch slurm: {command[0]} did not answer within {_ANSWER} s; is slurmctld up?") from None
    if ended.returncode and allowed not in ended.stderr:
        last = (ended.stderr.strip().splitlines() or [f"status {ended.returncode}"])[-1]
        raise UserError(f"launch slurm: {last.removeprefix(f'{command[0]}: error: ')}" + (f"; {hint}" if hint else ""))
    return ended.stdout


TARGET = Target(
    "a batch job of SLURM, taken up again when its time is over or a node fails",
    {
        "nodes": Option("--nodes=N", "how many", 1),
        "per_node": Option("--per_node=N", "processes of a node; one has all its devices", 1),
        "sbatch": Option(
            "--sbatch=OPTIONS", "sbatch's own, as '--partition=gpu --gpus-per-node=8 --cpus-per-task=64'", ""
        ),
        "save_seconds": Option("--save_seconds=S", "before the end of the job's time, to save in (120)", 120),
        **{name: option for name, option in hosts.OPTIONS.items() if name != "port"},
        **DETACH,
    },
    run,
    state,
    cancel,
    profile,
)
