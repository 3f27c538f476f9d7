"""Renders the chart with each file of values beside this one and holds the manifests against Kubernetes' schemas; prints
what it found as JSON.

render.py CHART
"""

import json
import pathlib
import sys

import helm_python
import kubernetes_validate
import yaml

# The oldest version that the chart is for, and later ones.
KUBERNETES = ["1.27", "1.30", "1.34"]
# Kinds that are not Kubernetes' own, of which it has no schema.
OF_OTHERS = ["monitoring.coreos.com/v1", "keda.sh/v1alpha1"]

chart_path = sys.argv[1]
chart = helm_python.Chart.load(chart_path)
wrong, kinds, checked = [], set(), 0


def manifests(values):
    for path, text in chart.render(values, name="release", namespace="space").items():
        if not path.endswith(".txt"):
            yield from (manifest for manifest in yaml.safe_load_all(text) if manifest)


for file in sorted(pathlib.Path(__file__).parent.glob("*.yaml")):
    values = helm_python.values_from_yaml(file.read_text())
    report = helm_python.lint(chart_path, values, strict=True)
    # Chart.yaml may lack an icon: that is told, and neither a warning nor an error.
    wrong += [f"{file.name}: {m}" for m in report["messages"] or [] if m["severity"] > 1]
    wrong += [f"{file.name}: {error}" for error in report["errors"] or []]
    chart.validate_schema(values)
    for manifest in manifests(values):
        kinds.add(manifest["kind"])
        if manifest["apiVersion"] in OF_OTHERS:
            continue
        for version in KUBERNETES:
            checked += 1
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                name = manifest["metadata"]["name"]
                wrong.append(f"{file.name}: {manifest['kind']} {name}, Kubernetes {version}: {error.path}: {error.message}")


def refusal(values):
    try:
        chart.validate_schema(chart.merge_values(values))
        list(manifests(values))
    except helm_python.HelmError as error:
        return str(error)
    return "taken"


etcd = {"etcd": {"endpoints": ["etcd:2379"]}}
refusals = {
    "nothing": refusal({}),
    "keda without address": refusal({**etcd, "keda": {"enabled": True}}),
    "unknown place": refusal({**etcd, "kvMirror": "everywhere"}),
    "typing error": refusal({**etcd, "shard": {"sparse": 1}}),
}
print(json.dumps({"wrong": wrong, "kinds": sorted(kinds), "checked": checked, "refusals": refusals}))
