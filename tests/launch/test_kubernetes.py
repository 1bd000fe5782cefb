"""The manifest: what Kubernetes and the operator understand, and what its pods run."""

from __future__ import annotations

import re
from functools import partial
from pathlib import PurePath
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.programs import CHECKOUT
from uoe_parallel.config.load import load_config
from uoe_parallel.parallel.layout import layout_faults
from uoe_parallel.pretrain import parse_arguments

MANIFEST = yaml.safe_load((CHECKOUT / "launch" / "kubernetes.yaml").read_text())
SPEC = MANIFEST["spec"]
WORKER = SPEC["pytorchReplicaSpecs"]["Worker"]
POD = WORKER["template"]["spec"]
[CONTAINER] = POD["containers"]


def _pod(**changes: Any) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "uoe"},
        # The operator gives pods their restart policy.
        "spec": {**POD, "restartPolicy": WORKER["restartPolicy"], **changes},
    }


def test_pods_are_valid() -> None:
    kubernetes_validate.validate(_pod(), "1.37", strict=True)


def test_validation_sees_mistakes() -> None:
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(_pod(gracePeriod=30), "1.37", strict=True)


def test_job_has_the_fields_that_the_operator_knows() -> None:
    assert (MANIFEST["apiVersion"], MANIFEST["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert SPEC.keys() <= {"elasticPolicy", "nprocPerNode", "pytorchReplicaSpecs", "runPolicy"}
    assert SPEC["elasticPolicy"].keys() <= {
        *("minReplicas", "maxReplicas", "rdzvBackend", "rdzvPort", "rdzvHost", "rdzvId"),
        *("rdzvConf", "standalone", "maxRestarts", "metrics"),
    }
    assert SPEC["runPolicy"].keys() <= {
        *("cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit"),
        *("schedulingPolicy", "suspend", "managedBy"),
    }
    assert WORKER.keys() == {"replicas", "restartPolicy", "template"}
    assert CONTAINER["name"] == "pytorch"
    assert [port["name"] for port in CONTAINER["ports"]] == ["pytorchjob-port"]


def test_pods_start_the_launchers_script_with_a_config_that_fits_their_ranks() -> None:
    shell, script = CONTAINER["command"]
    assert shell == "bash" and (CHECKOUT / script).is_file()
    options = parse_arguments(CONTAINER["args"])
    ranks = WORKER["replicas"] * int(SPEC["nprocPerNode"])
    checks = [partial(layout_faults, world_size=ranks)]
    config = load_config(CHECKOUT / options.config, options.overrides, checks)
    image = (CHECKOUT / "docker" / "Dockerfile.cuda").read_text()
    folder = PurePath(re.findall(r"^WORKDIR (.+)$", image, re.MULTILINE)[-1])
    shared = CONTAINER["volumeMounts"][0]["mountPath"]
    assert isinstance(config.data.train, str)
    assert all(
        (folder / path).is_relative_to(shared) for path in (config.run_dir, config.data.train)
    )
    assert str(CONTAINER["resources"]["limits"]["nvidia.com/gpu"]) == SPEC["nprocPerNode"]


def test_torchrun_gives_up_before_kubernetes_does() -> None:
    variables = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}
    assert int(variables["PET_SHUTDOWN_TIMEOUT"]) < POD["terminationGracePeriodSeconds"]
