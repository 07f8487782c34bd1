"""`kubectl`: its commands for one namespace of one cluster, and what to do about what it says."""

import subprocess
from collections.abc import Sequence

from ctllm_jax.common.errors import UserError

_NEXT = {  # what kubectl says: the next step
    "current-context is not set": "`gcloud container clusters get-credentials CLUSTER --location=LOCATION` sets it",
    "gke-gcloud-auth-plugin": "`gcloud components install gke-gcloud-auth-plugin`",
    "no matches for kind": "install JobSet 0.10 or later there: https://jobset.sigs.k8s.io/docs/installation/",
    "doesn't have a resource type": "install JobSet 0.10 or later there: https://jobset.sigs.k8s.io/docs/installation/",
    "unknown field": "the JobSet there is older than 0.10: https://jobset.sigs.k8s.io/docs/installation/",
    "exceeded quota": "ask for more, or take another --namespace: `kubectl describe resourcequota` has what is used",
    "already exists": "`ctllm launch list` may have that job; cancel it, or give another --name",
    "namespaces": "`kubectl create namespace NAMESPACE`, or take another --namespace",
    "orbidden": "the account needs the role Kubernetes Engine Developer in this project",
    "must be logged in": "log in with `gcloud auth login`",
    "eauthentication": "log in again with `gcloud auth login`",
    "nauthorized": "log in with `gcloud auth login`",
    "context": "`kubectl config get-contexts` has those that there are",
    "onnect": "is the cluster up, and reached from here? `gcloud container clusters list`",
}


class Cluster:
    """Commands for one namespace of one cluster, which has `wait` seconds to answer."""

    def __init__(self, context: str, namespace: str, wait: float):
        self._where, self._wait = [f"--context={context}", f"--namespace={namespace}"], wait

    def run(self, command: Sequence[str], text: str = "") -> str:
        """What a command prints that reads `text`; raises UserError as `kubectl`."""
        return kubectl(command, self._wait, text)

    def create(self, *flags: str) -> list[str]:
        return ["kubectl", "create", *self._where, "--filename=-", *flags]

    def get(self, job_id: str) -> list[str]:
        """Prints the JobSet of a job and its pods."""
        kinds = "jobsets.jobset.x-k8s.io,pods"
        return ["kubectl", "get", kinds, *self._where, f"--selector=ctllm-job={job_id}", "--output=json"]

    def warnings(self) -> list[str]:
        return ["kubectl", "get", "events", *self._where, "--field-selector=type=Warning", "--output=json"]

    def secret(self, name: str) -> list[str]:
        return ["kubectl", "get", "secret", name, *self._where, "--output=json"]

    def logs(self, pod: str, since: str) -> list[str]:
        """Follows the output of a pod's process; `since` is a time, or empty for the beginning."""
        limit = [f"--since-time={since}"] if since else []
        return ["kubectl", "logs", pod, *self._where, "--container=main", "--follow", *limit]

    def delete(self, name: str) -> list[str]:
        """Asks for the end of a JobSet, and lets its pods save; it is there until they are gone."""
        flags = ["--cascade=foreground", "--wait=false", "--ignore-not-found"]
        return ["kubectl", "delete", "jobsets.jobset.x-k8s.io", name, *self._where, *flags]

    def kill(self, job_id: str) -> list[str]:
        return ["kubectl", "delete", "pods", *self._where, f"--selector=ctllm-job={job_id}", "--now", "--wait=false"]

    def profile(self, pod: str) -> list[str]:
        """Tells the script in a pod, its first process, that a profile is wanted."""
        return ["kubectl", "exec", pod, *self._where, "--container=main", "--", "sh", "-c", "kill -URG 1"]


CONTEXT = ["kubectl", "config", "current-context"]  # prints which cluster is meant


def kubectl(command: Sequence[str], wait: float, text: str = "") -> str:
    """What a command of kubectl prints that reads `text` and may take `wait` seconds.

    Raises:
      UserError: there is no kubectl, it fails, it does not answer; with the next step where we know it.
    """
    try:
        ended = subprocess.run(command, input=text, capture_output=True, text=True, timeout=wait, check=False)
    except FileNotFoundError:
        raise UserError(
            "launch gke: no kubectl here; `gcloud components install kubectl`, then `gcloud container clusters "
            "get-credentials CLUSTER --location=LOCATION`"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(
            f"launch gke: {' '.join(command[:2])}: no answer within {wait:g} s; try again, or --wait longer"
        ) from None
    if ended.returncode == 0:
        return ended.stdout
    words = " ".join(ended.stderr.split()).removeprefix("error: ")[:500] or f"status {ended.returncode}"
    step = next((step for sign, step in _NEXT.items() if sign in words), "")
    raise UserError(f"launch gke: {' '.join(command[:2])}: {words}" + (f"; {step}" if step else ""))
