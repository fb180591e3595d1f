"""The files that put the server into a container and on Kubernetes: what they say fits the API's fields, the command line, and each other."""
import pathlib
import re

import jsonschema
import pytest
import yaml

from llmjax.cli import build_parser

LAUNCH = pathlib.Path(__file__).parent.parent.parent / "launch"


def closed(required, **properties):
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


# apps/v1 Deployment, core/v1 Pod and Service, policy/v1 PodDisruptionBudget of the Kubernetes API reference: the fields in use, required ones where it requires them
TEXT, NUMBER, BOOL, TEXTS = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"type": "object", "additionalProperties": {"type": "string"}}
META = closed(["name"], name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}, labels=TEXTS)
SELECTOR = closed([], matchLabels=TEXTS)
PROBE = closed(["httpGet"], httpGet=closed(["port"], path=TEXT, port={"type": ["string", "integer"]}), periodSeconds=NUMBER, timeoutSeconds=NUMBER, failureThreshold=NUMBER)
CONTAINER = closed(["name"], name=TEXT, image=TEXT, args={"type": "array", "items": TEXT}, ports={"type": "array", "items": closed(["containerPort"], name=TEXT, containerPort=NUMBER)},
                   startupProbe=PROBE, readinessProbe=PROBE, livenessProbe=PROBE, lifecycle=closed([], preStop=closed([], exec=closed(["command"], command={"type": "array", "items": TEXT}))),
                   resources=closed([], requests=TEXTS, limits=TEXTS),
                   securityContext=closed([], allowPrivilegeEscalation=BOOL, readOnlyRootFilesystem=BOOL, capabilities=closed([], drop={"type": "array", "items": TEXT})),
                   volumeMounts={"type": "array", "items": closed(["name", "mountPath"], name=TEXT, mountPath=TEXT, readOnly=BOOL)})
VOLUME = closed(["name"], name=TEXT, persistentVolumeClaim=closed(["claimName"], claimName=TEXT, readOnly=BOOL), secret=closed([], secretName=TEXT), emptyDir=closed([]))
POD = closed(["containers"], terminationGracePeriodSeconds=NUMBER, securityContext=closed([], runAsNonRoot=BOOL, runAsUser=NUMBER, fsGroup=NUMBER, seccompProfile=closed(["type"], type=TEXT)),
             containers={"type": "array", "items": CONTAINER, "minItems": 1}, volumes={"type": "array", "items": VOLUME})
DEPLOYMENT = closed(["apiVersion", "kind", "metadata", "spec"], apiVersion={"const": "apps/v1"}, kind={"const": "Deployment"}, metadata=META,
                    spec=closed(["selector", "template"], replicas=NUMBER, selector=SELECTOR,
                                strategy=closed([], type={"enum": ["RollingUpdate", "Recreate"]}, rollingUpdate=closed([], maxUnavailable=NUMBER, maxSurge=NUMBER)),
                                template=closed(["spec"], metadata=closed([], labels=TEXTS, annotations=TEXTS), spec=POD)))
SERVICE = closed(["apiVersion", "kind", "metadata", "spec"], apiVersion={"const": "v1"}, kind={"const": "Service"}, metadata=META,
                 spec=closed(["ports"], selector=TEXTS, ports={"type": "array", "items": closed(["port"], name=TEXT, port=NUMBER, targetPort={"type": ["string", "integer"]})}))
BUDGET = closed(["apiVersion", "kind", "metadata", "spec"], apiVersion={"const": "policy/v1"}, kind={"const": "PodDisruptionBudget"}, metadata=META,
                spec=closed([], minAvailable=NUMBER, selector=SELECTOR))


def test_deployment_fits_its_schema_and_itself():
    deployment, service, budget = list(yaml.safe_load_all((LAUNCH / "serve.yaml").read_text()))
    for thing, schema in ((deployment, DEPLOYMENT), (service, SERVICE), (budget, BUDGET)):
        jsonschema.validate(thing, schema)
    with pytest.raises(jsonschema.ValidationError):                                          # the schema can tell
        jsonschema.validate({**deployment, "spec": {**deployment["spec"], "replica": 2}}, DEPLOYMENT)
    template = deployment["spec"]["template"]
    labels, pod = template["metadata"]["labels"], template["spec"]
    assert all(x == labels for x in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"], budget["spec"]["selector"]["matchLabels"]))
    container = pod["containers"][0]
    assert {v["name"] for v in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    args = build_parser().parse_args(["serve", *container["args"]])
    assert args.verb == "serve" and args.drain + 5 < pod["terminationGracePeriodSeconds"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready" and container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert args.api_key_file.startswith(next(v["mountPath"] for v in container["volumeMounts"] if v["name"] == "keys"))


def test_container_file():
    text = (LAUNCH / "serve.Dockerfile").read_text()
    words = [line.split()[0] for line in text.splitlines() if line and line[0].isalpha()]
    assert words[:2] == ["ARG", "FROM"] and "USER" in words and set(words) <= {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENV", "EXPOSE", "ENTRYPOINT", "CMD"}
    entry = re.findall(r'"([^"]+)"', re.search(r"^ENTRYPOINT (.*)$", text, re.M)[1])
    assert entry[:2] == ["llmjax", "serve"]
    args = build_parser().parse_args([*entry[1:], "--model=/model"])
    deployed = next(iter(yaml.safe_load_all((LAUNCH / "serve.yaml").read_text())))["spec"]["template"]["spec"]
    assert args.port == deployed["containers"][0]["ports"][0]["containerPort"] and args.host == "0.0.0.0"
    assert f"USER {deployed['securityContext']['runAsUser']}" in text, "the pod runs as the image's user"
    for source in re.findall(r"^COPY (.+) \S+$", text, re.M):
        assert all((LAUNCH.parent / name).exists() for name in source.split())
