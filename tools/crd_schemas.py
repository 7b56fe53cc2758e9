"""Makes the small schemas in tests/k8s/schemas from CustomResourceDefinitions. Knows no cluster and no network.

Usage: python tools/crd_schemas.py CRD.yaml...    (tests/k8s/schemas/NOTICE says where they come from)

Left out: descriptions, status, every version but the one that is stored, and what another check looks at: pod
templates become {"x-core": "podtemplatespec"}, validated as core kinds are. Kept: types, required, enums, patterns,
bounds, and Kubernetes' own marks (int-or-string, preserve-unknown-fields); unknown fields are refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

INTO = Path(__file__).resolve().parents[1] / "tests" / "k8s" / "schemas"
KEPT = {
    "type", "required", "enum", "pattern", "minimum", "maximum", "minItems", "maxItems", "minLength", "maxLength",
    "exclusiveMinimum", "exclusiveMaximum", "default", "nullable", "minProperties", "maxProperties",
    "x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string",
}  # fmt: skip
COMBINED = ("anyOf", "allOf", "oneOf")


def slim(schema: dict[str, Any]) -> dict[str, Any]:
    """The same meaning, as far as it is checked here."""
    properties = schema.get("properties", {})
    if "containers" in properties.get("spec", {}).get("properties", {}):
        return {"x-core": "podtemplatespec"}
    made: dict[str, Any] = {key: value for key, value in schema.items() if key in KEPT}
    if properties:
        made["properties"] = {name: slim(field) for name, field in properties.items()}
    for key in ("items", "not"):
        if key in schema:
            made[key] = slim(schema[key])
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = slim(schema["additionalProperties"])
    for key in COMBINED:
        if key in schema:
            made[key] = [slim(each) for each in schema[key]]
    return made


def schemas(crd: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A file name and a schema for the version that is stored."""
    spec = crd["spec"]
    kind, group = spec["names"]["kind"], spec["group"]
    for version in spec["versions"]:
        if version["storage"]:
            whole = version["schema"]["openAPIV3Schema"]
            fields = {name: field for name, field in whole["properties"].items() if name == "spec"}
            made = slim({"type": "object", "required": ["spec"], "properties": fields})
            yield f"{group}_{version['name']}_{kind}.json", made


def main(files: list[str]) -> None:
    INTO.mkdir(parents=True, exist_ok=True)
    for file in files:
        for crd in yaml.safe_load_all(Path(file).read_text()):
            for name, schema in schemas(crd) if crd else ():
                (INTO / name).write_text(json.dumps(schema, sort_keys=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
