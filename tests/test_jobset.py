"""What `ctllm launch gke` makes: a JobSet and what its pods find; judged by Kubernetes' own rules where Go is there."""

import os
import pathlib
import shutil
import subprocess

import pytest
import yaml
from command import ctllm
from fake_hosts import Hosts
from test_targets_gke import fake_cluster, launch

from launch import jobset, ship

SCHEMA = pathlib.Path(__file__).with_name("jobset_schema")


@pytest.fixture
def here(tmp_path, monkeypatch):
    made = Hosts(tmp_path / "hosts", monkeypatch)
    with fake_cluster(made.folder, monkeypatch):
        yield made


def files(out: str) -> tuple[str, str]:
    """(the JobSet, ConfigMaps and Secret) of a dry run, as YAML."""
    made, _, rest = out.partition("--output=json\n# reads:\n")[2].partition("\nkubectl")
    return made, rest.partition("# reads; UID is the JobSet's:\n")[2].partition("# while it runs")[0]


def test_a_dry_run_prints_every_command_and_file_and_no_secret(here, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TOKEN", "tremendous-secret")
    (tmp_path / "pod.yaml").write_text(
        "spec:\n  serviceAccountName: trainer\n  containers: [{name: main, env: [{name: A, value: b}]}]\n"
        "  volumes: [{name: data, persistentVolumeClaim: {claimName: corpus}}]\n"
    )
    tpu = ["--accelerator=tpu-v6e-slice", "--topology=4x4", "--slices=2", "--spot", "--queue=team", "--name=big"]
    options = [*tpu, "--forward=TOKEN", "--restarts=7", "--save_seconds=50", f"--pod={tmp_path / 'pod.yaml'}"]
    status, out, err = ctllm(capsys, *launch(here, *options, "--dry_run"))
    assert (status, err, here.calls()) == (0, "", "config current-context\n") and "tremendous" not in out
    assert not (here.folder / "jobs").exists()
    shipped = ship.code("", here.checkout)
    assert out.startswith(f"# code: {shipped.revision}, tree {shipped.tree}\ngit -C {here.checkout} archive ")
    where = "--context=the-cluster --namespace=default"
    assert f"\nkubectl create {where} --filename=- --output=json\n# reads:\n" in out
    made, others = files(out)
    made, (code, secret) = yaml.safe_load(made), yaml.safe_load_all(others)
    assert made["metadata"]["name"] == "big" and made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert made["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    (child,) = made["spec"]["replicatedJobs"]
    job, pod = child["template"]["spec"], child["template"]["spec"]["template"]["spec"]
    assert (child["replicas"], job["parallelism"], job["completions"], job["backoffLimit"]) == (2, 4, 4, 0)
    assert made["spec"]["failurePolicy"]["maxRestarts"] == 7 and pod["terminationGracePeriodSeconds"] == 50
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}} and container["image"] == "python:3.12"
    assert container["env"] == [{"name": "A", "value": "b"}] and pod["serviceAccountName"] == "trainer"
    assert [volume["name"] for volume in pod["volumes"]] == ["ship", "memory", "data"]
    assert code["metadata"]["ownerReferences"][0] == {
        "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": "big", "uid": "UID"
    }  # fmt: skip
    assert container["envFrom"] == [{"secretRef": {"name": "big-variables"}}]
    assert secret["stringData"] == {"TOKEN": "***"}
    command = f'-m ctllm_jax.cli train --config="$home"/.ctllm/code/{shipped.tree}/configs/pretrain.py:tiny '
    script = code["data"]["run"]
    assert f"{here.environment}/bin/python {command}'--config.data.store=a b' --workdir=gs://b/RUN" in script
    assert "JAX_COORDINATOR" not in script  # JAX goes by what GKE sets in a TPU's pods
    gone = f"kubectl delete jobsets.jobset.x-k8s.io big {where} --cascade=foreground --wait=false --ignore-not-found\n"
    assert out.endswith(f"# in the end\n{gone}")
    assert f"\nkubectl logs POD {where} --container=main --follow\n" in out


def test_the_jobset_names_the_parts_of_the_archive_that_there_are(here, capsys, monkeypatch):
    """An archive made a second later may have another length."""
    lengths = iter([jobset._PART, *[jobset._PART + 1] * 9])
    git = ship._git
    monkeypatch.setattr(
        ship, "_git", lambda root, *a, **k: b"." * next(lengths) if a[0] == "archive" else git(root, *a, **k)
    )
    made, others = files(ctllm(capsys, *launch(here, "--dry_run"))[1])
    pod = yaml.safe_load(made)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    named = [source["configMap"]["name"] for source in pod["volumes"][0]["projected"]["sources"]]
    assert named == [entry["metadata"]["name"] for entry in yaml.safe_load_all(others)]


@pytest.mark.parametrize("environment", [True, False])
@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed (Debian: shellcheck)")
def test_what_pods_run_passes_shellcheck(here, capsys, tmp_path, environment):
    options = ["--nodes=3", "--devices=2", "--folder=a b", "--extra=gcs", "--dry_run"]
    command = [word for word in launch(here, *options) if environment or not word.startswith("--environment")]
    out = ctllm(capsys, *command)[1]
    (code,) = yaml.safe_load_all(files(out)[1])
    (tmp_path / "run").write_text(code["data"]["run"])
    checked = subprocess.run(["shellcheck", tmp_path / "run"], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def options(**given) -> dict:
    return {"accelerator": "", "topology": "", "slices": 0, "chips": 0, "nodes": 0, "gpus": 0, "spot": False, **given}


@pytest.mark.parametrize(
    ("accelerator", "topology", "chips", "hosts", "per_host"),
    [  # https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
        ("tpu-v4-podslice", "2x2x1", 0, 1, 4),
        ("tpu-v4-podslice", "2x2x4", 0, 4, 4),
        ("tpu-v5p-slice", "4x4x4", 0, 16, 4),
        ("tpu-v5-lite-podslice", "1x1", 0, 1, 1),
        ("tpu-v5-lite-podslice", "2x4", 0, 2, 4),  # ct5lp-hightpu-4t
        ("tpu-v5-lite-podslice", "2x4", 8, 1, 8),  # ct5lp-hightpu-8t
        ("tpu-v6e-slice", "16x16", 0, 64, 4),
        ("tpu7x", "2x2x2", 0, 2, 4),
    ],
)
def test_a_slices_hosts_are_those_of_its_topology(accelerator, topology, chips, hosts, per_host):
    shape = jobset.shape(options(accelerator=accelerator, topology=topology, chips=chips, slices=1))
    assert (shape.groups, shape.hosts, shape.resource) == (1, hosts, {"google.com/tpu": per_host})


def test_gpus_are_asked_for_by_hosts():
    shape = jobset.shape(options(accelerator="nvidia-h100-80gb", nodes=4))
    assert (shape.groups, shape.hosts, shape.resource) == (1, 4, {"nvidia.com/gpu": 8})
    assert shape.selector == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert jobset.shape(options()).resource == {}


def test_what_is_laid_over_joins_lists_by_name():
    base = {"a": [{"name": "x", "v": 1}, {"name": "y"}], "b": {"c": 1, "d": 2}, "e": [1]}
    over = {"a": [{"name": "y", "v": 2}, {"name": "z"}, {"key": 1}], "b": {"c": 3}, "e": [2], "f": 4}
    assert jobset.overlaid(base, over) == {
        "a": [{"name": "x", "v": 1}, {"name": "y", "v": 2}, {"name": "z"}, {"key": 1}],
        "b": {"c": 3, "d": 2},
        "e": [1, 2],
        "f": 4,
    }


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A program that judges Kubernetes objects by JobSet's and Kubernetes' own Go modules: (status, what it says)."""
    go = shutil.which("go", path=f"{os.environ['PATH']}{os.pathsep}/usr/local/go/bin")
    if not go:
        pytest.skip("there is no Go here (1.24 or later)")
    if subprocess.run([go, "mod", "download"], cwd=SCHEMA, capture_output=True, check=False).returncode:
        pytest.skip("Kubernetes' Go modules cannot be had here")
    program = tmp_path_factory.mktemp("judge") / "judge"
    subprocess.run([go, "build", "-o", program, "."], cwd=SCHEMA, check=True)
    environment = {**os.environ, "PATH": f"{os.environ['PATH']}{os.pathsep}{pathlib.Path(go).parent}"}

    def judged(text: str) -> tuple[int, str]:
        ended = subprocess.run(
            [program], cwd=SCHEMA, env=environment, input=text, capture_output=True, text=True, check=False
        )
        return ended.returncode, ended.stdout + ended.stderr

    return judged


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        ["--accelerator=tpu-v6e-slice", "--topology=4x4", "--slices=2", "--spot", "--queue=team", "--forward=TOKEN"],
        ["--accelerator=tpu-v5p-slice", "--topology=16x16x24", "--name=a23456789012345678901234567890123456"],
        ["--accelerator=nvidia-h100-80gb", "--nodes=64", "--restarts=0", "--forward=TOKEN"],
        ["--devices=2", "--pod=POD"],
    ],
)
def test_kubernetes_and_jobset_take_what_is_made(judge, here, capsys, monkeypatch, tmp_path, given):
    monkeypatch.setenv("TOKEN", "tremendous-secret")
    (tmp_path / "pod").write_text(
        "metadata: {annotations: {gke-gcsfuse/volumes: 'true'}}\n"
        "spec:\n  serviceAccountName: trainer\n  hostNetwork: true\n  dnsPolicy: ClusterFirstWithHostNet\n"
        "  tolerations: [{key: a, operator: Exists}]\n"
        "  volumes: [{name: data, persistentVolumeClaim: {claimName: corpus}}]\n"
        "  containers: [{name: main, volumeMounts: [{name: data, mountPath: /data}]}]\n"
    )
    given = [word.replace("POD", str(tmp_path / "pod")) for word in given]
    status, out, err = ctllm(capsys, *launch(here, *given, "--dry_run"))
    assert status == 0, err
    made, others = files(out)
    parts = [yaml.safe_load(text) for text in others.split("---\n")]
    for part in parts:
        part.update({"binaryData": {"code.000": "AAAA"}} if part["kind"] == "ConfigMap" else {})
    status, said = judge(f"{made}---\n{yaml.safe_dump_all(parts)}")
    assert status == 0 and said.count(": good\n") == 1 + len(parts), said


@pytest.mark.slow
def test_what_kubernetes_or_jobset_would_refuse_is_seen(judge, here, capsys):
    made, _ = files(ctllm(capsys, *launch(here, "--nodes=2", "--dry_run"))[1])
    for right, wrong, said in (
        ("maxRestarts: 3", "maxRestart: 3", 'unknown field "maxRestart"'),
        ("maxRestarts: 3", "maxRestarts: three", "must be of type integer"),
        ("action: FailJobSet", "action: Fail", "supported values"),
        ("BackoffLimitExceeded", "Backoff", "invalid job failure reason"),
        ("  - name: host", f"  - name: {'host' * 12}", "will exceed 63 characters"),
        ("restartPolicy: Never", "restartPolicy: OnFailure", 'only "Never" is supported'),
        (
            "- name: memory\n                mountPath",
            "- name: memori\n                mountPath",
            'Not found: "memori"',
        ),
        ("- name: main", "- name: man", "must be one of the container"),
    ):
        assert right in made
        status, found = judge(made.replace(right, wrong, 1))
        assert status == 1 and said in found, found
