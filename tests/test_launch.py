"""The launchers of scripts/launch: each starts `drift run` with the config on every host, or says what is missing."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from math import prod
from pathlib import Path

import pytest
import typer.main
import yaml

from drift_jax.cli import app

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "scripts/launch"
SCRIPTS = sorted(path.name for path in (*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")))
CONFIG = "configs/debug.yaml"
ODD = ["--run-dir", "/mnt/my runs/it's", "--set", "train.beta=0.2"]  # quoted wrongly, these words would fall apart
XPK = ["--cluster", "c", "--tpu-type=v5litepod-16", "--docker-image", "gcr.io/p/drift:1", "--storage", "shared"]


def launch(script: str, *words: str, dry_run: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
    """A launcher as a person starts it in the checkout, on a machine with none of the tools it calls."""
    path = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    env = path | ({"DRY_RUN": "1"} if dry_run else {}) | env
    return subprocess.run(
        ["bash", str(LAUNCH / script), *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )


def words_of(script: str, *words: str, **env: str) -> list[list[str]]:
    """The commands that a launcher would run, each as words."""
    done = launch(script, *words, **env)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def option(words: list[str], name: str) -> str:
    """The value of `--name=value` in a command."""
    (value,) = [word.partition("=")[2] for word in words if word.startswith(f"{name}=")]
    return value


def task(name: str) -> dict:
    return yaml.safe_load((LAUNCH / name).read_text())


def sky_run(name: str, directory: Path, **env: str) -> list[str]:
    """The words of `drift run` when the `run` of a SkyPilot task is executed, with a `drift` that prints them."""
    drift = directory / ".venv/bin/drift"
    drift.parent.mkdir(parents=True, exist_ok=True)
    drift.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    drift.chmod(0o755)
    envs = {key: value for key, value in task(name)["envs"].items() if value is not None}
    done = subprocess.run(
        ["bash", "-c", task(name)["run"]], cwd=directory, env={"PATH": os.environ["PATH"]} | envs | env,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def jobset_pod() -> dict:
    (job,) = task("gke_jobset.yaml")["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]["spec"]


# --- what is started ---------------------------------------------------------------------------------------


def test_local_starts_every_process() -> None:
    commands = words_of("local.sh", "3", CONFIG, *ODD, DRIFT="python -m drift_jax")
    for process, words in enumerate(commands):
        start = words.index("python")
        assert words[start : start + 5] == ["python", "-m", "drift_jax", "run", CONFIG]
        assert words[words.index("--process-id") + 1] == str(process)
        assert words[words.index("--num-processes") + 1] == "3"
        assert words[-4:] == ODD
        assert {"JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=2"} <= set(words)
    assert len(commands) == 3
    assert len({words[words.index("--coordinator") + 1] for words in commands}) == 1


def test_local_takes_devices_and_port() -> None:
    (words,) = words_of("local.sh", "1", CONFIG, JAX_NUM_CPU_DEVICES="4", PORT="1234", DRIFT="drift")
    assert "JAX_NUM_CPU_DEVICES=4" in words and words[words.index("--coordinator") + 1] == "127.0.0.1:1234"


def test_local_stops_the_others_when_one_fails(tmp_path: Path) -> None:
    drift = tmp_path / "drift"
    drift.write_text(f'#!/bin/bash\necho $$ >> {tmp_path}/pids\n[[ "${{*: -1}}" == 1 ]] && exit 7\nsleep 600\n')
    drift.chmod(0o755)
    done = launch("local.sh", "3", CONFIG, dry_run=False, DRIFT=str(drift))
    assert done.returncode == 7
    assert "process 1 of 3 ended with exit code 7" in done.stderr
    for pid in (tmp_path / "pids").read_text().split():
        assert not Path(f"/proc/{pid}").exists()


def test_slurm_starts_one_process_a_node() -> None:
    (words,) = words_of(
        "slurm.sbatch", CONFIG, *ODD,
        SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="4", SLURM_GPUS_ON_NODE="2", SLURM_CPUS_ON_NODE="16",
    )  # fmt: skip
    assert words[:2] == ["JAX_LOCAL_DEVICE_IDS=0,1", "srun"]
    assert option(words, "--nodes") == option(words, "--ntasks") == "4"
    assert option(words, "--ntasks-per-node") == option(words, "--kill-on-bad-exit") == "1"
    assert option(words, "--cpus-per-task") == "16"
    start = words.index("run")
    assert Path(words[start - 1]).name == "drift" and words[start:] == ["run", CONFIG, *ODD]


def test_slurm_directives() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    directives = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert directives["ntasks-per-node"] == "1"
    assert int(directives["nodes"]) > 1 and int(directives["gpus-per-node"]) >= 1
    assert {"time", "requeue"} <= directives.keys()
    # Slurm reads no directive after the first command.
    before = text[: text.rindex("\n#SBATCH --")]
    assert all(line.startswith("#") for line in before.splitlines())
    assert len(directives) == text.count("#SBATCH --")


def test_gcloud_runs_on_all_workers() -> None:
    (words,) = words_of("gcloud.sh", "run", "slice", CONFIG, *ODD, ZONE="us-east5-b", PROJECT="p")
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice"]
    assert option(words, "--worker") == "all" and option(words, "--zone") == "us-east5-b"
    assert option(words, "--project") == "p"
    remote = shlex.split(option(words, "--command"))
    assert remote[:3] == ["cd", "drift_jax", "&&"]
    assert remote[3:] == ["exec", ".venv/bin/drift", "run", CONFIG, "--distributed", "on", *ODD]


@pytest.mark.parametrize(
    ("type", "version"),
    [
        ("v6e-16", "v2-alpha-tpuv6e"),
        ("v5p-16", "v2-alpha-tpuv5"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v4-16", "tpu-ubuntu2204-base"),
    ],
)
def test_gcloud_creates_with_the_software_of_the_type(type: str, version: str) -> None:
    (words,) = words_of("gcloud.sh", "create", "slice", type, "--spot", ZONE="z")
    assert option(words, "--accelerator-type") == type and option(words, "--version") == version
    assert "--spot" in words


def test_gcloud_prepares_all_workers() -> None:
    for action in (["mount", "slice", "10.0.0.2:/share"], ["install", "slice"], ["stop", "slice"]):
        done = launch("gcloud.sh", *action, ZONE="z")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("--worker=all") == done.stdout.count("gcloud compute tpus tpu-vm ") >= 1
        for command in re.findall(r"'--command=(.*?)' --zone", done.stdout, re.DOTALL):
            assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0, command


def test_xpk_creates_one_workload() -> None:
    (words,) = words_of("xpk.sh", *XPK, "--num-slices", "2", "--max-restarts=3", "--workload", "mine", CONFIG, *ODD)
    assert words[:3] == ["xpk", "workload", "create"]
    given = {name: option(words, name) for name in ("--cluster", "--tpu-type", "--docker-image", "--storage")}
    assert list(given.values()) == ["c", "v5litepod-16", "gcr.io/p/drift:1", "shared"]
    assert option(words, "--num-slices") == "2" and option(words, "--workload") == "mine"
    assert option(words, "--max-restarts") == "3" and option(words, "--restart-on-exit-codes") == "1,75"
    assert shlex.split(option(words, "--command")) == ["drift", "run", CONFIG, *ODD]


@pytest.mark.parametrize(("name", "extra"), [("sky_tpu.yaml", "tpu"), ("sky_gpu.yaml", "cuda")])
def test_sky_tasks(name: str, extra: str) -> None:
    sky = task(name)
    assert sky.keys() <= {"name", "num_nodes", "resources", "workdir", "envs", "file_mounts", "setup", "run"}
    assert {"CONFIG", "RUN_DIR"} <= sky["envs"].keys() and (ROOT / sky["envs"]["CONFIG"]).exists()
    assert sky["envs"]["NFS"] is None  # SkyPilot asks for it
    assert sky["resources"]["accelerators"]
    assert f"-e '.[{extra}]'" in sky["setup"] and "/mnt/drift" in sky["setup"]
    assert sky["envs"]["RUN_DIR"].startswith("/mnt/drift/")
    for text in (sky["setup"], sky["run"]):
        assert text.startswith("set -euo pipefail\n")
        assert subprocess.run(["bash", "-n", "-c", text]).returncode == 0


def test_sky_tpu_runs_on_a_host(tmp_path: Path) -> None:
    words = sky_run("sky_tpu.yaml", tmp_path, CONFIG=CONFIG, RUN_DIR="/mnt/my runs", OPTIONS="--set train.beta=0.2")
    assert words == ["run", CONFIG, "--run-dir", "/mnt/my runs", "--distributed", "on", "--set", "train.beta=0.2"]
    assert task("sky_tpu.yaml")["num_nodes"] == 1  # the hosts of a slice are nodes of their own


def test_sky_gpu_runs_on_a_node(tmp_path: Path) -> None:
    for rank in range(2):
        words = sky_run(
            "sky_gpu.yaml", tmp_path, CONFIG=CONFIG, RUN_DIR="/mnt/runs",
            SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2", SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK=str(rank),
        )  # fmt: skip
        assert words[:4] == ["run", CONFIG, "--run-dir", "/mnt/runs"]
        assert words[4:] == ["--coordinator", "10.0.0.1:8476", "--num-processes", "2", "--process-id", str(rank)]
    assert task("sky_gpu.yaml")["num_nodes"] > 1


def test_jobset_has_a_pod_for_every_host() -> None:
    jobset, pod = task("gke_jobset.yaml"), jobset_pod()
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    hosts = job["template"]["spec"]["parallelism"]
    assert hosts == job["template"]["spec"]["completions"] and job["template"]["spec"]["backoffLimit"] == 0
    (container,) = pod["containers"]
    assert container["command"][:2] == ["drift", "run"] and (ROOT / container["command"][2]).exists()
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert hosts * chips == prod(int(n) for n in topology.split("x"))
    (mount,) = container["volumeMounts"]
    assert mount["name"] in {volume["name"] for volume in pod["volumes"]}
    assert any(word.startswith(mount["mountPath"]) for word in container["command"])


def test_the_image_holds_what_it_installs() -> None:
    text = (LAUNCH / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in line.split()[:-1]), line
    assert "ARG EXTRA=tpu" in text and "WORKDIR /app" in text


def test_drift_run_has_every_option_that_launchers_give(tmp_path: Path) -> None:
    sky = dict(SKYPILOT_NODE_IPS="10.0.0.1", SKYPILOT_NUM_NODES="1", SKYPILOT_NODE_RANK="0")
    (gcloud,) = words_of("gcloud.sh", "run", "slice", CONFIG, ZONE="z")
    (xpk,) = words_of("xpk.sh", *XPK, CONFIG)
    commands = {
        "local.sh": words_of("local.sh", "1", CONFIG)[0],
        "slurm.sbatch": words_of("slurm.sbatch", CONFIG)[0],
        "gcloud.sh": shlex.split(option(gcloud, "--command")),
        "xpk.sh": shlex.split(option(xpk, "--command")),
        "sky_tpu.yaml": sky_run("sky_tpu.yaml", tmp_path),
        "sky_gpu.yaml": sky_run("sky_gpu.yaml", tmp_path, **sky),
        "gke_jobset.yaml": jobset_pod()["containers"][0]["command"],
    }
    run = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    known = {name for parameter in run.params for name in parameter.opts}
    for launcher, words in commands.items():
        used = [word for word in words[words.index("run") :] if word.startswith("--")]
        assert set(used) <= known, launcher


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script: str) -> None:
    assert subprocess.run(["bash", "-n", str(LAUNCH / script)]).returncode == 0
    if script != "quote.sh":  # it is sourced
        assert "\nset -euo pipefail\n" in (LAUNCH / script).read_text()


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "quote.sh"])
def test_help_is_the_comment_at_the_top(script: str) -> None:
    done = launch(script, "--help")
    assert done.returncode == 0 and f"scripts/launch/{script}" in done.stdout and "DRY_RUN" in done.stdout
    assert "set -euo" not in done.stdout and "#" not in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("local.sh", "N, the number of processes, is missing"),
        (f"local.sh {CONFIG}", f"N must be a number of processes, found '{CONFIG}'"),
        (f"local.sh 0 {CONFIG}", "N must be a number of processes, found '0'"),
        ("local.sh 2", "CONFIG is missing"),
        ("local.sh 2 --set a=b", "CONFIG is missing"),
        ("local.sh 2 configs/none.yaml", "there is no config file configs/none.yaml"),
        ("slurm.sbatch", "CONFIG is missing"),
        ("slurm.sbatch configs/none.yaml", "there is no config file configs/none.yaml"),
        (f"SLURM_GPUS_ON_NODE=0 slurm.sbatch {CONFIG}", "the job has no GPUs"),
        (f"DRY_RUN=0 slurm.sbatch {CONFIG}", "submit it with sbatch"),
        ("gcloud.sh", "what to do is missing"),
        ("gcloud.sh start slice", "'start' is none of"),
        ("ZONE=z gcloud.sh run", "NAME, the name of the slice, is missing"),
        (f"gcloud.sh run slice {CONFIG}", "ZONE is not set"),
        ("ZONE=z gcloud.sh run slice", "CONFIG is missing"),
        ("ZONE=z gcloud.sh run slice configs/none.yaml", "there is no config file configs/none.yaml"),
        ("ZONE=z gcloud.sh create slice", "TYPE is missing"),
        ("ZONE=z gcloud.sh create slice H100", "no TPU software is known for 'H100'"),
        ("ZONE=z gcloud.sh mount slice /share", "SERVER:/EXPORT"),
        (f"xpk.sh {CONFIG}", "--cluster is missing"),
        ("xpk.sh --cluster", "--cluster needs a value"),
        (f"xpk.sh --cluster c --docker-image i {CONFIG}", "--tpu-type is missing"),
        (f"xpk.sh --cluster c --tpu-type v5p-16 {CONFIG}", "--docker-image or --base-docker-image is missing"),
        (f"xpk.sh {' '.join(XPK)} --base-docker-image i {CONFIG}", "one image is enough"),
        (f"xpk.sh {' '.join(XPK)}", "CONFIG is missing"),
        (f"xpk.sh {' '.join(XPK)} configs/none.yaml", "there is no config file configs/none.yaml"),
        (f"xpk.sh {' '.join(XPK)} --set a=b {CONFIG}", "unknown option --set"),
        (f"xpk.sh {' '.join(XPK)} --num-slices two {CONFIG}", "--num-slices must be a number, found 'two'"),
        (f"xpk.sh {' '.join(XPK)} --workload My_Run {CONFIG}", "--workload must be"),
    ],
)
def test_bad_arguments(words: str, message: str) -> None:
    names = shlex.split(words)
    env = dict(name.split("=", 1) for name in names[:1] if "=" in name)
    script, *rest = names[len(env) :]
    done = launch(script, *rest, **env)
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ") and message in done.stderr.splitlines()[0]
    assert f"scripts/launch/{script}" in done.stderr  # how it is used
    assert done.stdout == ""
