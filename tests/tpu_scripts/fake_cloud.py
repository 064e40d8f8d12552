"""A cloud in a folder: `gcloud` and `kubectl` that know only the commands and flags of their published references.

`gcloud` keeps queued resources in CLOUD/resources.json. A host is a folder CLOUD/hosts/NODE-w-WORKER that is the home of what runs
there: `ssh --command` is a real shell in it, and deleting the TPUs kills what it left behind. Every call is a line in CLOUD/calls.
References: cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/{create,delete,list,scp,ssh},
kubernetes.io/docs/reference/kubectl/generated/kubectl_apply.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

# A flag with its legal values as a pattern; None is a flag without a value.
ANYWHERE = {"--project": r"[a-z][-a-z0-9]+", "--quiet": None, "--format": r".+"}
ZONE = {"--zone": r"[a-z]+-[a-z]+\d-[a-z]"}
HOSTS = {"--node": r"all|\d+", "--worker": r"all|\d+", "--batch-size": r"all|\d+"}
COMMANDS = {
    "create": ZONE
    | {
        "--accelerator-type": r"(v4|v5p|v6e|v5litepod)-\d+",
        "--runtime-version": r"tpu-ubuntu2204-base|v2-alpha-tpuv(5|5-lite|6e)",
        "--node-id": r"[A-Za-z0-9_.~+%-]+",
        "--node-count": r"[2-9]|[1-9]\d+",
        "--node-prefix": r"[A-Za-z0-9_.~+%-]+",
        "--async": None,
        "--spot": None,
        "--reserved": None,
        "--guaranteed": None,
        "--internal-ips": None,
        "--valid-until-duration": r"\d+[smhd]",
        "--network": r".+",
        "--subnetwork": r".+",
        "--service-account": r".+@.+",
        "--labels": r"\w+=\w+(,\w+=\w+)*",
    },
    "delete": ZONE | {"--async": None, "--force": None},
    "list": ZONE | {"--filter": r".+", "--limit": r"\d+"},
    "scp": ZONE | HOSTS | {"--internal-ip": None, "--tunnel-through-iap": None},
    "ssh": ZONE | HOSTS | {"--command": r".+", "--internal-ip": None, "--tunnel-through-iap": None},
}
RUNTIMES = {"v4": "tpu-ubuntu2204-base", "v5p": "v2-alpha-tpuv5", "v6e": "v2-alpha-tpuv6e"}
# The host's own Python is 3.10, as on the images of today: it can install uv, and uv makes an environment.
PYTHON_OF_A_HOST = """#!/bin/sh
echo "python3 $*" >> "$HOME/installation"
case "$*" in
  -c*) exit 1 ;;
  "-m pip install --user --quiet uv") ;;
  "-m uv venv --quiet --seed --python 3.12 .venv")
    mkdir -p .venv/bin
    printf '#!/bin/sh\\ncase "$1 $2" in "-m pip") echo "pip $*" >> "$HOME/installation" ;; *) exec %s "$@" ;; esac\\n' > .venv/bin/python
    chmod +x .venv/bin/python ;;
  *) exit 9 ;;
esac
""".replace("%s", sys.executable)


def main(cloud: Path, program: str, arguments: list[str]) -> int:
    """Does what the program would, on the folder `cloud`."""
    with open(cloud / "calls", "a") as calls:
        calls.write(json.dumps([program, *arguments]) + "\n")
    if program == "kubectl":
        if arguments != ["apply", "--filename=-"]:
            sys.exit(f"error: unknown command {arguments}")
        (cloud / "applied.yaml").write_text(sys.stdin.read())
        return 0
    if arguments[:2] == ["config", "get-value"]:
        (name,) = arguments[2:]
        print(json.loads((cloud / "settings.json").read_text()).get(name, ""))
        return 0
    if arguments[:3] != ["compute", "tpus", "queued-resources"]:
        sys.exit(f"ERROR: (gcloud) Invalid choice: {arguments}")
    if (cloud / "offline").exists():
        sys.exit("ERROR: (gcloud) There was a problem refreshing your current auth tokens")
    words, flags = parse(arguments[3], arguments[4:])
    for required in ("--zone", "--project"):
        if required not in flags:
            sys.exit(f"ERROR: {required} must be specified")
    return {"create": create, "delete": delete, "list": show, "scp": copy, "ssh": connect}[
        arguments[3]
    ](cloud, words, flags)


def parse(command: str, arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Plain words, and flags with their values."""
    words, flags = [], {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not name.startswith("-"):
            words.append(argument)
            continue
        known = COMMANDS[command] | ANYWHERE
        if name not in known:
            sys.exit(f"ERROR: (gcloud) unrecognized arguments: {argument}")
        pattern = known[name]
        if (pattern is None) == bool(equals) or (
            pattern and not re.fullmatch(pattern, value, re.DOTALL)
        ):
            sys.exit(f"ERROR: (gcloud) argument {name}: invalid value: {value!r}")
        if name in flags:
            sys.exit(f"ERROR: (gcloud) argument {name}: given twice")
        flags[name] = value
    return words, flags


def resources(cloud: Path) -> dict:
    """Queued resources by name: {"states": states to come, the first is now; "nodes": names; "hosts": per node}."""
    file = cloud / "resources.json"
    return json.loads(file.read_text()) if file.exists() else {}


def save(cloud: Path, all_resources: dict) -> None:
    """Replaces the record of queued resources."""
    (cloud / "new.json").write_text(json.dumps(all_resources))
    os.replace(cloud / "new.json", cloud / "resources.json")


def create(cloud: Path, words: list[str], flags: dict) -> int:
    """A request, and the homes of its hosts."""
    (name,) = words
    kind = flags["--accelerator-type"].split("-")[0]
    if flags["--runtime-version"] != RUNTIMES.get(kind, "v2-alpha-tpuv5-lite"):
        sys.exit(f"ERROR: runtime {flags['--runtime-version']} is not for {kind}")
    if ("--node-id" in flags) == ("--node-count" in flags) or {"--spot", "--reserved"} <= set(
        flags
    ):
        sys.exit("ERROR: (gcloud) argument group: exactly one must be specified")
    if name in resources(cloud):
        sys.exit(f"ERROR: ALREADY_EXISTS: {name}")
    nodes = (
        [flags["--node-id"]]
        if "--node-id" in flags
        else [f"{flags['--node-prefix']}-{i}" for i in range(int(flags["--node-count"]))]
    )
    settings = json.loads((cloud / "settings.json").read_text())
    states = settings.get("states", ["ACTIVE"])
    hosts = {node: [f"{node}-w-{i}" for i in range(settings.get("workers", 2))] for node in nodes}
    for host in every(hosts):
        home = cloud / "hosts" / host
        (home / "bin").mkdir(parents=True)
        for program, text in (
            ("hostname", f"#!/bin/sh\necho {host}\n"),
            ("python3", PYTHON_OF_A_HOST),
        ):
            (home / "bin" / program).write_text(text)
            (home / "bin" / program).chmod(0o755)
    save(cloud, resources(cloud) | {name: {"states": states, "hosts": hosts}})
    return 0


def show(cloud: Path, words: list[str], flags: dict) -> int:
    """A line per request; each look brings it one state further."""
    if flags.get("--format") != "value(name.basename(),state.state)":
        sys.exit("ERROR: this fake knows one --format")
    all_resources = resources(cloud)
    for name, resource in all_resources.items():
        print(f"{name}\t{resource['states'][0]}")
        if len(resource["states"]) > 1:
            del resource["states"][0]
    save(cloud, all_resources)
    return 0


def delete(cloud: Path, words: list[str], flags: dict) -> int:
    """The end of a request and of its hosts."""
    (name,) = words
    all_resources = resources(cloud)
    if name not in all_resources:
        sys.exit(f"ERROR: NOT_FOUND: {name}")
    if "--force" not in flags:
        sys.exit("ERROR: the queued resource has nodes: use --force")
    take_hosts_away(cloud, all_resources.pop(name))
    save(cloud, all_resources)
    return 0


def take_hosts_away(cloud: Path, resource: dict) -> None:
    """Pulls the plug: what ran on the hosts is gone, and so are their disks."""
    for host in every(resource["hosts"]):
        home = cloud / "hosts" / host
        pid = home / "smoljax_run" / "pid"
        if pid.exists():
            with contextlib.suppress(ProcessLookupError):  # It may have ended by itself.
                os.killpg(int(pid.read_text()), signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


def chosen(cloud: Path, name: str, flags: dict) -> list[Path]:
    """The homes of the hosts that --node and --worker name (the first of each by default)."""
    resource = resources(cloud).get(name)
    if resource is None or resource["states"][0] != "ACTIVE":
        sys.exit(f"ERROR: {name} is not ACTIVE")
    node, worker = flags.get("--node", "0"), flags.get("--worker", "0")
    hosts = [
        host
        for i, of_node in enumerate(resource["hosts"].values())
        for j, host in enumerate(of_node)
        if node in ("all", str(i)) and worker in ("all", str(j))
    ]
    return [cloud / "hosts" / host for host in hosts]


def every(hosts: dict[str, list[str]]) -> list[str]:
    """The hosts of all nodes."""
    return [host for of_node in hosts.values() for host in of_node]


def copy(cloud: Path, words: list[str], flags: dict) -> int:
    """A file to every chosen host."""
    source, target = words
    name, _, place = target.partition(":")
    for home in chosen(cloud, name, flags):
        shutil.copy(source, home / place)
    return 0


def connect(cloud: Path, words: list[str], flags: dict) -> int:
    """A command line in a shell on every chosen host, at the same time; the worst exit code."""
    (name,) = words
    shells = [
        subprocess.Popen(
            ["bash", "-c", flags["--command"]],
            cwd=home,
            env={"HOME": str(home), "PATH": f"{home}/bin:/usr/bin:/bin", "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for home in chosen(cloud, name, flags)
    ]
    for shell in shells:
        sys.stdout.buffer.write(shell.communicate()[0])
    return max(shell.returncode for shell in shells)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]))
