"""`ctllm launch gke` with a kubectl that checks commands against its reference, on a cluster of processes here."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from command import ctllm
from fake_hosts import Hosts, git
from fake_kubectl import FACTS
from test_targets import PROFILES, SAVES, TRAIN, launched, ready
from waiting import WAIT, ended, once_there

from launch import jobs, jobset, kubectl, pods, ship, view
from launch.kubectl import Cluster

FAKE = pathlib.Path(__file__).with_name("fake_kubectl.py")
CLUSTER = Cluster("c", "n", 1)


@contextlib.contextmanager
def fake_cluster(folder: pathlib.Path, monkeypatch):
    """A fake kubectl whose cluster lies in `folder`; `folder / "bin"` is where commands are found. Nothing is left."""
    path = folder / "bin" / "kubectl"
    libraries = pathlib.Path(yaml.__file__).parent.parent
    path.write_text(f'#!/bin/sh\nPYTHONPATH={libraries} exec {sys.executable} -S {FAKE} "$@"\n')
    path.chmod(0o755)
    monkeypatch.setenv("FAKE_KUBECTL", str(folder))
    try:
        yield
    finally:
        (folder / "says").unlink(missing_ok=True)
        for made in (folder / "objects").glob("JobSet.*"):
            subprocess.run([path, *CLUSTER.delete(made.name.partition(".")[2])[1:]], check=True)
            with contextlib.suppress(FileNotFoundError):
                job_id = json.loads(made.read_text())["metadata"]["labels"]["ctllm-job"]
                subprocess.run([path, *CLUSTER.kill(job_id)[1:]], check=True)
            for _ in range(100):
                if made.exists():
                    time.sleep(0.1)


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    made = Hosts(tmp_path / "hosts", monkeypatch)
    monkeypatch.setattr(view, "_ASK", 0.2)
    with fake_cluster(made.folder, monkeypatch):
        yield made


def launch(hosts: Hosts, *options: str) -> list[str]:
    return ["launch", "gke", f"--environment={hosts.environment}", *options, "--", *TRAIN]


def left(hosts: Hosts) -> list[str]:
    """What is there of a job in the cluster, once it has had the time to go."""
    for _ in range(WAIT * 10):
        found = [path.name for path in (hosts.folder / "objects").iterdir()]
        if not found:
            break
        time.sleep(0.1)
    return found


# ---- What is run


def test_the_code_arrives_the_processes_run_and_a_secret_is_seen_by_them_alone(hosts, capsys, monkeypatch):
    monkeypatch.setenv("TOKEN", "tremendous-secret")
    monkeypatch.setattr(jobset, "_PART", 1 << 10)  # so that the archive has several
    hosts.program(
        """
        import json
        (FOLDER / f"told{INDEX}").write_text(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]))
        print("my token is", os.environ["TOKEN"])
        """
    )
    options = ["--forward=TOKEN", "--variables=PLAIN='it is $HOME'", "--folder=work", "--nodes=2"]
    status, out, err = ctllm(capsys, *launch(hosts, *options))
    assert status == 0 and not left(hosts), out + err
    (job,) = jobs.everything()
    tree = ship.code("", hosts.checkout).tree
    for index in range(2):
        assert f"[{index} host-0-{index}] my token is <TOKEN>\n" in out
        home = hosts.folder / f"{job.id}-host-0-{index}-a0"
        code = home / ".ctllm" / "code" / tree
        arguments, environment, folder = json.loads((hosts.folder / f"told{index}").read_text())
        config = f"--config={code}/configs/pretrain.py:tiny"
        assert arguments == ["train", config, *TRAIN[2:], "--config.distributed=True"]
        assert folder == str(home / "work") and environment["PYTHONPATH"] == str(code)
        assert environment["JAX_PROCESS_ID"] == str(index) and environment["JAX_NUM_PROCESSES"] == "2"
        assert environment["TOKEN"] == "tremendous-secret" and environment["PLAIN"] == "it is $HOME"
        assert len(list((home / "ship").glob("code.*"))) > 1
        assert sorted(path.name for path in code.iterdir() if path.name != "__pycache__") == sorted(
            git(hosts.checkout, "ls-tree", "--name-only", "HEAD").split()
        )
    kept = [*(hosts.folder / "jobs").iterdir(), *(hosts.folder / "logs").iterdir()]  # the cluster's own logs, too
    assert not any("tremendous" in text for text in (out, err, hosts.calls(), *(path.read_text() for path in kept)))
    assert (job.target, job.status) == ("gke", 0) and job.revision == git(hosts.checkout, "rev-parse", "HEAD").strip()


def test_failures_are_counted_the_resume_status_is_not_and_the_budget_is_kept(hosts, capsys):
    hosts.program(
        """
        attempt = len(list(FOLDER.glob(f"attempt{INDEX}.*")))
        (FOLDER / f"attempt{INDEX}.{attempt}").touch()
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        while len(list(FOLDER.glob(f"attempt*.{attempt}"))) < 2:
            time.sleep(0.01)
        if INDEX == "1":
            sys.exit([75, 5, 0][attempt])
        while attempt == 1:  # asked to save when the other one fails
            time.sleep(0.1)
        sys.exit([75, 75, 0][attempt])
        """
    )
    status, out, err = ctllm(capsys, *launch(hosts, "--nodes=2", "--restarts=1"))
    assert status == 0 and not left(hosts), out + err
    assert (
        "[1 host-0-1] launch: ended with status 5 after " in out and out.count("launch: starting all pods again") == 2
    )
    assert "launch: starting all pods again (restart 1 of 1)\n" in out
    hosts.program("sys.exit(int(INDEX) and 5)")
    status, out, err = ctllm(capsys, *launch(hosts, "--nodes=2", "--restarts=1"))
    assert status == 5 and "failed: jobset failed due to reaching max number of restarts" in out and not left(hosts)


def test_pods_that_always_ask_at_once_to_be_started_again_are_given_up_and_those_that_ran_a_while_are_not(
    hosts, monkeypatch
):
    for name in ("_TICK", "_SOON", "_LATER", "_REST"):
        monkeypatch.setattr(pods, name, 0.001)
    handle = {"context": "a", "namespace": "b", "wait": 1, "name": "big", "forward": [], "groups": 1, "hosts": 1}
    handle |= {"restarts": 3, "keep": False, "queue_minutes": 1, "start_minutes": 1}
    (hosts.folder / "jobs").mkdir()
    for life, status in ((59, 1), (60, 0)):
        job = jobs.Job(f"train-{life}", "gke", ("train",), "", 0.0, handle)
        job.log.touch()
        writer, asked, attempts = pods.Writer(job), [], iter(range(30))
        monkeypatch.setattr(pods.Cluster, "run", lambda _, command, asked=asked: asked.append(command[1]))

        def look(_, writer=writer, asked=asked, attempts=attempts, life=life):
            writer._lives["pod"] = life  # as its last line says
            attempt = next(attempts)
            end = "Completed" if attempt == 29 else ""
            return pods.JobSetStatus("delete" not in asked or bool(end), end, "", attempt, 0, [])

        monkeypatch.setattr(pods, "fetch_status", look)
        assert writer.run() == status and asked == ["delete"]
        assert next(attempts, 30) == (22 if status else 30)


def test_a_mistake_is_not_started_again_and_what_was_made_stays_with_keep(hosts, capsys):
    hosts.program("sys.exit(2) if INDEX == '3' else time.sleep(1000)")
    tpu = ["--accelerator=tpu-v5-lite-podslice", "--topology=2x4", "--slices=2"]
    status, out, err = ctllm(capsys, *launch(hosts, *tpu, "--name=big", "--keep"))
    assert status == 2 and "starting all" not in out and "[3 slice-1-1] launch: ended with status 2" in out, out + err
    assert (hosts.folder / "objects" / "JobSet.big").exists() and "delete" not in hosts.calls()


@pytest.mark.slow
def test_the_environment_is_made_in_the_pod_where_the_image_has_none(hosts, capsys):
    hosts.program("print('here')")
    command = [word for word in launch(hosts, "--extra=tpu") if not word.startswith("--environment")]
    status, out, err = ctllm(capsys, *command)
    assert status == 0 and "[0 host-0-0] here\n" in out, out + err
    hosts.program("sys.exit(127)")  # what a shell says of a command that is not there
    assert ctllm(capsys, *launch(hosts, "--restarts=0"))[0] == 127
    status, out, err = ctllm(capsys, "launch", "gke", "--environment=/nowhere", "--", *TRAIN)
    assert status == 2 and "no /nowhere/bin/python in the image; leave --environment out" in out


# ---- The end, whoever brings it about


def test_ctrl_c_waits_until_all_have_saved(hosts):
    hosts.program("print('first line', flush=True)\n" + SAVES)
    with launched(hosts, launch(hosts, "--nodes=2")) as launcher:
        pids = ready(hosts)
        for index in range(2):  # pods that are gone before they were looked at have told nobody their status
            once_there(jobs.everything()[0].log, f"host-0-{index}] first line")
        launcher.send_signal(signal.SIGINT)
        said = launcher.communicate(timeout=WAIT)[0]
        assert launcher.returncode == 75 and "ended with status 75; the same command goes on" in said, said
        assert all((hosts.folder / f"saved{index}").exists() for index in range(2)) and all(map(ended, pids))
    assert not left(hosts)


def test_jobs_are_listed_taken_up_by_another_terminal_and_cancelled(hosts, capsys):
    hosts.program("print('first line', flush=True)\n" + SAVES)
    status, _, err = ctllm(capsys, *launch(hosts, "--nodes=2", "--detach"))
    assert status == 0 and "it goes on without this terminal" in err
    pids = ready(hosts)
    (job,) = jobs.everything()
    assert "2 of 2 pods have started" in ctllm(capsys, "launch", "list")[1]
    once_there(job.log, "[1 host-0-1] first line")
    writer = writers(job)
    assert len(writer) == 1
    os.kill(writer[0], signal.SIGKILL)
    assert ended(writer[0])
    assert "2 of 2 pods" in ctllm(capsys, "launch", "list")[1] and writers(job) not in ([], writer)
    assert ctllm(capsys, "launch", "cancel", job.id, "--now")[0] == 0
    status, out, _ = ctllm(capsys, "launch", "attach", job.id)
    assert status in (75, 143) and "launch: the JobSet was deleted" in out and all(map(ended, pids)) and not left(hosts)
    assert ctllm(capsys, "launch", "cancel", job.id)[2] == f"launch: {job.id}: ended with status {status}\n"


def test_all_pods_are_asked_for_a_profile_and_go_on(hosts, capsys):
    hosts.program(PROFILES)
    assert ctllm(capsys, *launch(hosts, "--nodes=2", "--detach"))[0] == 0
    ready(hosts)
    (job,) = jobs.everything()
    assert ctllm(capsys, "launch", "profile", job.id)[0] == 0
    assert [once_there(hosts.folder / f"profiled{index}") for index in range(2)] == ["x", "x"]
    assert "2 of 2 pods" in ctllm(capsys, "launch", "list")[1]
    assert ctllm(capsys, "launch", "cancel", job.id)[0] == 0
    assert ctllm(capsys, "launch", "attach", job.id)[0] == 75 and not left(hosts)
    assert "does not run" in ctllm(capsys, "launch", "profile", job.id)[2]


def writers(job: jobs.Job) -> list[int]:
    """The processes that write down what becomes of a job."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"launch.pods\0{job.id}".encode() in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
    return found


# ---- Mistakes, and clusters that do not do it


@pytest.mark.parametrize(
    ("state", "said"),
    [
        pytest.param({"image": "bad"}, "0 of 2 pods have started; 0 host-0-0 waits: ImagePull", marks=pytest.mark.slow),
        pytest.param({"nodes": "1"}, "1 of 2 pods have started; 1 host-0-1 waits: Unsch", marks=pytest.mark.slow),
        (
            {"nodes": "0", "warnings": "FailedScaleUp: GCE quota exceeded"},
            "; FailedScaleUp: GCE quota exceeded; ask for more under IAM & Admin > Quotas",
        ),
    ],
)
def test_pods_that_do_not_start_are_given_up_in_time_with_the_reason(hosts, capsys, state, said):
    hosts.program("time.sleep(1000)")
    for name, text in state.items():
        if name == "warnings":
            reason, _, message = text.partition(": ")
            about = {"involvedObject": {"name": "big-host-0-0-x"}, "reason": reason, "message": message}
            text = json.dumps({"items": [about | {"lastTimestamp": "2026-01-01T00:00:00Z"}]})
        (hosts.folder / name).write_text(text)
    limits = ["--wait=1", "--start_minutes=0.02", "--queue_minutes=0.02"]
    status, out, err = ctllm(capsys, *launch(hosts, "--nodes=2", "--name=big", *limits))
    assert status == 1 and "launch: given up after " in out and said in out, out + err
    assert not left(hosts)


@pytest.mark.parametrize(
    ("says", "step"),
    [
        ("error: current-context is not set", "gcloud container clusters get-credentials"),
        (
            'error: resource mapping not found for name: "x" namespace: "" from "STDIN": no matches for kind "JobSet" '
            'in version "jobset.x-k8s.io/v1alpha2"\nensure CRDs are installed first',
            "install JobSet 0.10",
        ),
        ("The connection to the server 10.0.0.1 was refused - did you specify the right host or port?", "cluster up"),
        ("error: You must be logged in to the server (Unauthorized)", "log in with `gcloud auth login`"),
        ('Error from server (Forbidden): jobsets.jobset.x-k8s.io is forbidden: User "a" cannot', "needs the role"),
        ('Error from server (Forbidden): jobsets "a" is forbidden: exceeded quota: small', "kubectl describe resource"),
        ('error: context "elsewhere" does not exist', "kubectl config get-contexts"),
        ('Error from server (BadRequest): strict decoding error: unknown field "spec.a"', "older than 0.10"),
    ],
)  # fmt: skip
def test_what_kubernetes_refuses_is_one_line_with_the_next_step(hosts, capsys, says, step):
    (hosts.folder / "says").write_text(says)
    status, _, err = ctllm(capsys, *launch(hosts))
    assert status == 2 and err.count("\n") == 1 and err.startswith("ctllm: error: launch gke: kubectl ") and step in err
    assert not jobs.everything()


def test_mistakes_are_one_line_each(hosts, capsys, monkeypatch, tmp_path):
    (tmp_path / "list.yaml").write_text("- a")
    v6e = "--accelerator=tpu-v6e-slice"
    for arguments, message in (
        (launch(hosts, "--nodes=-1"), "launch gke: --nodes=-1: must be at least 0"),
        (launch(hosts, "--save_seconds=0"), "--save_seconds=0: must be at least 1"),
        (launch(hosts, "--topology=2x2"), "--topology is for TPUs: give --accelerator=tpu-"),
        (launch(hosts, "--gpus=2"), "--gpus needs --accelerator=NAME"),
        (launch(hosts, v6e), "--topology=: a slice of tpu-v6e-slice is given as 4x4"),
        (launch(hosts, v6e, "--topology=2x2x1"), "--topology=2x2x1: a slice of tpu-v6e-slice is given as 4x4"),
        (launch(hosts, v6e, "--topology=3x3"), "--topology=3x3: 9 chips are not a multiple of the 4 of a host"),
        (launch(hosts, v6e, "--topology=2x2", "--slices=2"), "--slices=2: slices of one host are not joined"),
        (launch(hosts, v6e, "--topology=4x4", "--nodes=2"), "--nodes is not for TPUs: give --topology"),
        (launch(hosts, "--accelerator=tpu-v9"), "no such TPU; there are: tpu-v4-podslice, "),
        (launch(hosts, "--name=Big"), "--name=Big: must be up to 36 of a-z"),
        (launch(hosts, f"--pod={tmp_path / 'none'}"), "No such file"),
        (launch(hosts, f"--pod={tmp_path / 'list.yaml'}"), "must be a YAML mapping with `metadata`"),
        ([*launch(hosts, "--nodes=2")[: -len(TRAIN)], "eval"], "eval runs in one process, not in 2: ask for one host"),
    ):
        status, out, err = ctllm(capsys, *arguments)
        assert (status, out, err.count("\n")) == (2, "", 1) and message in err, err
    assert not hosts.calls()
    with pytest.raises(kubectl.UserError, match=r"kubectl sleep: no answer within 0.2 s; try again"):
        (hosts.folder / "bin" / "kubectl").write_text("#!/bin/sh\nexec sleep 9\n")
        kubectl.kubectl(["kubectl", "sleep"], 0.2)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(kubectl.UserError, match="no kubectl here; `gcloud components install kubectl`"):
        kubectl.kubectl(["kubectl"], 1)


def test_a_result_that_would_go_with_the_pod_is_refused(hosts, capsys, tmp_path):
    pod = tmp_path / "pod.yaml"
    pod.write_text(
        "spec:\n  volumes: [{name: nfs, nfs: {server: s, path: /}}, {name: scratch, emptyDir: {}}]\n"
        "  containers:\n  - name: main\n"
        "    volumeMounts: [{name: nfs, mountPath: /shared/}, {name: scratch, mountPath: /s}]\n"
    )
    for given, options, lost in (
        ("RUN", [], True),
        ("/shared/RUN", [], True),
        ("/shared/RUN", [f"--pod={pod}"], False),
        ("/sharedRUN", [f"--pod={pod}"], True),
        ("/shared/../RUN", [f"--pod={pod}"], True),
        ("/s/RUN", [f"--pod={pod}"], True),
        ("RUN", [f"--pod={pod}", "--folder=/shared"], False),
        ("gs://b/RUN", [], False),
    ):
        status, out, err = ctllm(capsys, *launch(hosts, *options, "--dry_run")[:-1], f"--workdir={given}")
        said = f"launch gke: --workdir={given} is on the disk of a pod, and lost with it: give --workdir=gs://BUCKET/"
        assert (status == 2 and said in err and not out) if lost else (status == 0 and not err), (given, err)
    assert "create" not in hosts.calls()


def test_a_name_that_is_taken_is_refused(hosts, capsys):
    hosts.program("time.sleep(1000)")
    assert ctllm(capsys, *launch(hosts, "--name=big", "--detach"))[0] == 0
    status, _, err = ctllm(capsys, *launch(hosts, "--name=big"))
    assert (
        status == 2 and "already exists; `ctllm launch list` may have that job" in err and len(jobs.everything()) == 1
    )


def test_who_ended_the_others_is_told_by_the_statuses():
    assert pods.culprit([69, 5, 75]) == 5 and pods.culprit([75, 69]) == 69 and pods.culprit([5, 2]) == 2
    assert pods.culprit([0, 75]) == 75


@pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl here")
def test_a_real_kubectl_takes_the_commands():
    forms = [
        (CLUSTER.create("--output=json"), '{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}}'),
        (CLUSTER.get("a"), ""),
        (CLUSTER.warnings(), ""),
        (CLUSTER.secret("a"), ""),
        (CLUSTER.logs("a", "2026-01-01T00:00:00Z"), ""),
        (CLUSTER.delete("a"), ""),
        (CLUSTER.kill("a"), ""),
        (CLUSTER.profile("a"), ""),
    ]
    assert len(forms) == len(FACTS) - 1
    for command, text in forms:
        with pytest.raises(kubectl.UserError, match='context "c" does not exist'):  # its parser has taken it
            kubectl.kubectl(command, 20, text)
    with pytest.raises(kubectl.UserError, match="unknown flag"):
        kubectl.kubectl([*forms[1][0], "--selektor=a"], 20)
