"""What the schemas say of a manifest: Kubernetes' own, and those of custom resources in schemas/. Knows no rule."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.k8s.manifests import Doc, name_of

SCHEMAS = Path(__file__).parent / "schemas"
OLDEST = (1, 30)


def versions() -> list[str]:
    """Of Kubernetes, from the oldest that is supported to the newest that is known."""
    folders = importlib.resources.files("kubernetes_validate").joinpath("kubernetes-json-schema").iterdir()
    found = (re.fullmatch(r"v(\d+)\.(\d+)\.\d+-local-strict", folder.name) for folder in folders)
    known = sorted((int(match[1]), int(match[2])) for match in found if match)
    return [f"{major}.{minor}" for major, minor in known if (major, minor) >= OLDEST]


def problems(doc: Doc, version: str) -> Iterator[str]:
    """One line each."""
    group = doc["apiVersion"].rpartition("/")[0]
    if "." not in group or (group.endswith(".k8s.io") and not (SCHEMAS / _file(doc)).exists()):
        yield from _core(doc, version)
    elif (SCHEMAS / _file(doc)).exists():
        yield from _custom(doc, version)
    else:
        yield f"{name_of(doc)}: no schema {_file(doc)}; make one with tools/crd_schemas.py"


def _file(doc: Doc) -> str:
    group, _, version = doc["apiVersion"].rpartition("/")
    return f"{group}_{version}_{doc['kind']}.json"


def _core(doc: Doc, version: str) -> Iterator[str]:
    try:
        validator = _core_schema(doc["apiVersion"], doc["kind"], version)
    except FileNotFoundError:
        yield f"{name_of(doc)}: Kubernetes {version} has no {doc['apiVersion']} {doc['kind']}"
        return
    for error in validator.iter_errors(doc):
        yield f"{name_of(doc)}: {error.json_path}: {error.message[:300]}"


@cache
def _core_schema(api_version: str, kind: str, version: str) -> Draft202012Validator:
    """What `kubernetes-validate --strict` validates with; it reads all definitions again for each object."""
    group, _, number = api_version.rpartition("/")
    api = f"{group.partition('.')[0]}-{number}" if group else number
    schema = json.loads(_packaged(version, f"{kind.lower()}-{api}.json"))
    return Draft202012Validator(schema, registry=_definitions(version))


@cache
def _definitions(version: str) -> Registry[Any]:
    return Resource.from_contents(json.loads(_packaged(version, "_definitions.json"))) @ Registry()


def _packaged(version: str, file: str) -> str:
    folder = importlib.resources.files("kubernetes_validate").joinpath("kubernetes-json-schema")
    return folder.joinpath(f"v{version}.0-local-strict").joinpath(file).read_text()


@cache
def _schema(file: str) -> Draft202012Validator:
    return Draft202012Validator(_closed(json.loads((SCHEMAS / file).read_text())))


def _custom(doc: Doc, version: str) -> Iterator[str]:
    schema = json.loads((SCHEMAS / _file(doc)).read_text())
    body = {"spec": _filled(doc.get("spec", {}), schema["properties"]["spec"])}
    for error in _schema(_file(doc)).iter_errors(body):
        yield f"{name_of(doc)}: {error.json_path}: {error.message[:300]}"
    for where, template in _templates(doc.get("spec"), schema["properties"]["spec"], "spec"):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        for problem in _core(pod, version):
            yield f"{name_of(doc)}, {where}: {problem}"


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """As JSON Schema reads it: unknown fields are refused, null where the server drops it, numbers for quantities."""
    if "x-core" in schema:
        return {"type": "object"}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: value for key, value in schema.items() if not key.startswith("x-") and key not in ("nullable",)}
    if "properties" in schema:
        made["properties"] = {name: _closed(field) for name, field in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            made[key] = _closed(schema[key])
    for key in ("anyOf", "allOf", "oneOf", "not"):
        made.pop(key, None)  # they repeat properties without types: rules that the server's CEL does better
    return made


def _filled(value: Any, schema: dict[str, Any]) -> Any:
    """With the defaults that the server writes before it looks for what is required."""
    if isinstance(value, dict) and "properties" in schema:
        fields = schema["properties"]
        whole = {name: field["default"] for name, field in fields.items() if "default" in field} | value
        return {name: _filled(each, fields.get(name, {})) for name, each in whole.items() if each is not None}
    if isinstance(value, list) and "items" in schema:
        return [_filled(each, schema["items"]) for each in value]
    return value


def _templates(value: Any, schema: dict[str, Any], where: str) -> Iterator[tuple[str, Doc]]:
    """Every pod template, and where it stands."""
    if "x-core" in schema and value:
        yield where, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from _templates(each, schema.get("properties", {}).get(name, {}), f"{where}.{name}")
    elif isinstance(value, list):
        for number, each in enumerate(value):
            yield from _templates(each, schema.get("items", {}), f"{where}[{number}]")
