"""Check what starts servers elsewhere against the published schemas and a linter.

    python -m tools.manifests [--crds FOLDER] [--json FILE]

Manifests of many kinds of requests are rendered, and validated:

- Kubernetes: by the schemas of several of its versions (`kubernetes-validate`), where
  an unknown field is an error;
- KServe: by its CustomResourceDefinitions, in FOLDER: `config/crd/full` of its
  repository; unknown fields are errors here, too;
- Ray Serve: by the class that Ray itself reads a configuration with;
- container files: by hadolint;
- alert rules: by promtool, which also runs their unit tests.

What is not installed or not given is "not checked", by name.
"""

from __future__ import annotations

import importlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from lepton_jax.cli.settings import Parser
from lepton_jax.launch.submit.job import Volume
from lepton_jax.ship.scale import Deployment, render

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("1.30", "1.32", "1.34", "1.36")  # of Kubernetes
CONTAINER_FILES = ("Dockerfile", "serve.Dockerfile")
RAY = "ray.serve.schema"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if nothing is wrong, else 1."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    results = [
        _kubernetes(),
        _kserve(options.crds),
        _ray(),
        _container_files(),
        _alerts(),
    ]
    for row in results:
        print(json.dumps(row))
    if options.json is not None:
        command = f"python -m tools.manifests {' '.join(words)}"
        record = {"command": command, "results": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(row.get("wrong") for row in results))


def _parser() -> Parser:
    parser = Parser(prog="python -m tools.manifests", description=__doc__)
    add = parser.add_argument
    add("--crds", type=Path, metavar="FOLDER", help="KServe's CRDs, as YAML files")
    add("--json", type=Path, metavar="FILE")
    return parser


def requests() -> Iterator[Deployment]:
    """Yield requests of many kinds."""
    base = Deployment(
        name="digits",
        artifacts=("/models/digits.lepton",),
        image="registry.example/lepton:1",
    )
    volumes = (
        (Volume("models", "/models", read_only=True),),
        (Volume("gs://bucket", "/models", read_only=True), Volume("/logs", "/logs")),
    )
    grown = ((1, 1), (3, 3), (2, 10))
    for (least, most), gpus, mounted in itertools.product(grown, (0, 2), volumes):
        yield replace(
            base,
            least=least,
            most=most,
            gpus=gpus,
            memory=4 * 2**30 if gpus else None,
            volumes=mounted,
            node={"pool": "serving"} if gpus else {},
            environment={"PRICE": "$(ODD) 1"},
            arguments=("--tls-cert=/tls/tls.crt", "--tls-key=/tls/tls.key"),
        )


# ---- the checks ----


def _kubernetes() -> dict[str, Any]:
    library = _library("kubernetes_validate")
    if library is None:
        return {"what": "Kubernetes", "checked": False, "why": "kubernetes-validate"}
    wrong = []
    count = 0
    for request in requests():
        for document in yaml.safe_load_all(render("k8s", request)):
            for release in VERSIONS:
                count += 1
                try:
                    library.validate(document, release, strict=True)
                except library.ValidationError as error:
                    wrong.append(f"{release}, {document['kind']}: {error}")
    return {
        "what": "Kubernetes",
        "checked": True,
        "by": f"kubernetes-validate {version('kubernetes-validate')}",
        "versions": list(VERSIONS),
        "documents": count,
        "wrong": wrong,
    }


def _kserve(folder: Path | None) -> dict[str, Any]:
    library = _library("jsonschema")
    if folder is None or library is None:
        why = "--crds" if folder is None else "jsonschema"
        return {"what": "KServe", "checked": False, "why": why}
    schemas = _schemas(folder)
    wrong = []
    count = 0
    for request in requests():
        for document in yaml.safe_load_all(render("kserve", request)):
            count += 1
            key = (document["apiVersion"], document["kind"])
            validator = library.Draft202012Validator(schemas[key])
            wrong += [
                f"{document['kind']} {list(error.absolute_path)}: {error.message}"
                for error in validator.iter_errors(document)
            ]
    return {
        "what": "KServe",
        "checked": True,
        "by": "its CustomResourceDefinitions",
        "documents": count,
        "wrong": wrong,
    }


def _schemas(folder: Path) -> dict[tuple[str, str], Any]:
    """Return the schema of each (apiVersion, kind) that a folder's files define."""
    schemas = {}
    for path in folder.rglob("*.yaml"):
        definition = yaml.safe_load(path.read_text())
        if (definition or {}).get("kind") != "CustomResourceDefinition":
            continue
        spec = definition["spec"]
        for one in spec["versions"]:
            key = (f"{spec['group']}/{one['name']}", spec["names"]["kind"])
            schemas[key] = strict(one["schema"]["openAPIV3Schema"])
    return schemas


def strict(schema: Any) -> Any:
    """Return a schema of Kubernetes' dialect as JSON Schema that knows no other field.

    Kubernetes itself drops unknown fields without a word.
    """
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {}
    for key, value in schema.items():
        if key in ("properties", "patternProperties"):
            made[key] = {name: strict(part) for name, part in value.items()}
        elif key in ("enum", "required", "default", "format"):
            made[key] = value
        else:
            made[key] = strict(value)
    is_open = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in schema and not is_open:
        made.setdefault("additionalProperties", False)
    return made


def _ray() -> dict[str, Any]:
    library = _library(RAY)
    if library is None:
        return {"what": "Ray Serve", "checked": False, "why": "ray[serve]"}
    wrong = []
    count = 0
    for request in requests():
        bare = replace(request, image=None, volumes=(), node={})
        for document in yaml.safe_load_all(render("ray", bare)):
            count += 1
            try:
                library.ServeDeploySchema.model_validate(document)
            except ValueError as error:
                wrong.append(str(error))
    return {
        "what": "Ray Serve",
        "checked": True,
        "by": f"ray {version('ray')}",
        "documents": count,
        "wrong": wrong,
    }


def _container_files() -> dict[str, Any]:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    linter = linter or shutil.which("hadolint")
    if linter is None:
        return {"what": "container files", "checked": False, "why": "hadolint"}
    wrong = []
    for name in CONTAINER_FILES:
        path = ROOT / "docs" / "kubernetes" / name
        done = subprocess.run(
            [linter, "--no-color", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        wrong += [line for line in done.stdout.splitlines() if line.strip()]
    said = subprocess.run(
        [linter, "--version"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "what": "container files",
        "checked": True,
        "by": said.stdout.strip(),
        "documents": len(CONTAINER_FILES),
        "wrong": wrong,
    }


def _alerts() -> dict[str, Any]:
    tool = shutil.which("promtool")
    if tool is None:
        return {"what": "alert rules", "checked": False, "why": "promtool"}
    folder = ROOT / "docs" / "monitoring"
    commands = (
        ["check", "rules", "alerts.yaml"],
        ["test", "rules", "alerts.test.yaml"],
    )
    wrong = []
    for command in commands:
        done = subprocess.run(
            [tool, *command],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            wrong.append(f"{done.stdout}{done.stderr}".strip())
    said = subprocess.run(
        [tool, "--version"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "what": "alert rules",
        "checked": True,
        "by": said.stdout.splitlines()[0].partition(" (")[0],
        "documents": 1,
        "wrong": wrong,
    }


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


if __name__ == "__main__":
    sys.exit(main())
