"""The step benchmark: what is handed to the sides, what a line says, and both sides' losses on the same ids."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drift_jax.models import triton
from drift_jax.models.architecture import qwen_config_from_hf
from drift_jax.models.intervals import KeyIntervals
from tests.script_modules import script_module
from tests.tiny_pairs import build_tiny_policy

REPO = Path(__file__).parents[1]
SCRIPT = REPO / "scripts" / "bench_step.py"
PEERS = REPO / "scripts" / "peers"
MEASURES = ("pairs_per_s", "real_tokens_per_s", "real_token_share", "tflops", "peak_rss_gb", "compile_s", "loss")


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    with script_module(SCRIPT) as module:
        yield module


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pads with its turn end, as the demo model: torch does not train that row of the embeddings."""
    return build_tiny_policy(tmp_path_factory.mktemp("bench") / "m", vocab_size=384, pad_token_id=381, eos_token_id=381)


@pytest.fixture(scope="module")
def beside_trl(model_dir: Path) -> dict[str, Any]:
    """Two real pairs, an update each, on both sides."""
    command = [sys.executable, str(SCRIPT), "--peer", "trl", "--peer-python", sys.executable, "--pairs", "2"]
    command += ["--batch-size", "1", "--max-length", "64", "--model", str(model_dir), "--learning-rate", "1e-3"]
    command += ["--profile", "5"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 1
    kernels = [line for line in done.stderr.splitlines() if re.search(r" ms +\d+ times ", line)]
    assert len(kernels) == 5, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_line_has_both_sides(beside_trl: dict[str, Any]) -> None:
    line = beside_trl
    for name in MEASURES:
        assert isinstance(line[name], float) and isinstance(line["peer_" + name], float), name
    keys = {"mfu", "peak_device_gb", "max_length", "batch_size", "dtype", "device", "versions", "commit", "data"}
    assert keys <= set(line) and line["peer_failed"] is None
    assert line["peer"] == "trl" and line["pairs"] == 2 and line["device"] == "cpu" and line["mfu"] is None
    assert line["ratio"] == pytest.approx(line["pairs_per_s"] / line["peer_pairs_per_s"], rel=1e-2)
    assert line["peer_versions"]["trl"] and line["versions"]["jax"]


@pytest.mark.slow
def test_both_sides_do_the_same_work(beside_trl: dict[str, Any]) -> None:
    """The second update's loss has the first one in it: the learning rate moves it away from ln 2."""
    assert beside_trl["loss"] == pytest.approx(beside_trl["peer_loss"], rel=1e-4)
    assert abs(beside_trl["loss"] - np.log(2)) > 1e-2
    assert beside_trl["logps_chosen"] == pytest.approx(beside_trl["peer_logps_chosen"], rel=1e-4)


def arguments(model_dir: Path, **changes: Any) -> Namespace:
    settings = {"data": None, "max_length": 64, "max_completion": None, "pairs": 4, "model": model_dir}
    return Namespace(**(settings | changes))


def test_real_pairs_are_cut_as_asked(bench: Any, model_dir: Path) -> None:
    pairs, _ = bench.load_ids(arguments(model_dir))
    assert len(pairs) == 4
    for pair in pairs:
        assert 0 < len(pair["prompt_ids"]) <= 32
        assert all(0 < len(pair["prompt_ids"] + pair[side]) <= 64 for side in ("chosen_ids", "rejected_ids"))
    shorter, _ = bench.load_ids(arguments(model_dir, max_completion=5))
    assert all(len(pair[side]) == 5 for pair in shorter for side in ("chosen_ids", "rejected_ids"))
    assert [pair["chosen_ids"][:5] for pair in pairs] == [pair["chosen_ids"] for pair in shorter]


def test_a_missing_file_is_told(bench: Any, model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "SHARED_DATA", tmp_path / "dsat_real.jsonl")
    pairs, data = bench.load_ids(arguments(model_dir))
    assert len(pairs) == 4 and data == "compare.jsonl (dsat_real.jsonl is not there)"
    with pytest.raises(bench.PeerError, match="has 64 pairs, --pairs is 65"):
        bench.load_ids(arguments(model_dir, pairs=65))


def test_chosen_is_the_reply_after_the_complaint(bench: Any, tmp_path: Path) -> None:
    turn = {"role": "user", "content": "Why?"}
    row = {"prompt": [turn], "rejected": [{"role": "assistant", "content": "So."}], "user_preference": turn}
    rows = [row | {"id": "a"}, row | {"id": "b", "next_assistant": "Because."}]
    path = tmp_path / "dsat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (pair,) = bench.read_real_pairs(path)
    assert (pair.id, pair.chosen, pair.rejected) == ("b", "Because.", "So.")


def test_useful_flops_by_hand(bench: Any) -> None:
    config = {"hidden_size": 4, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"intermediate_size": 8, "vocab_size": 10, "model_type": "qwen2", "rope_theta": 1e4}
    config = qwen_config_from_hf(config)
    pair = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}
    weights = 3 * (4 * 4 + 2 * 4 * 2 + 4 * 4 + 3 * 4 * 8)
    seen = 1 + 2 + 3 + 3  # the prompt's two positions, then each completion's
    forward = 2 * weights * 4 + 2 * 10 * 4 * 2 + 4 * 4 * 3 * seen
    assert bench.useful_flops(config, [pair]) == 4 * forward
    assert bench.useful_flops(config, [pair, pair]) == 8 * forward


def test_peak_is_known_by_the_whole_name(bench: Any) -> None:
    assert bench.known_peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert bench.known_peak("NVIDIA H100 PCIe", "bfloat16") is None  # 756e12: another card
    assert bench.known_peak("NVIDIA H100 80GB HBM3", "float32") is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pairs", "15"], "multiple of --batch-size"),
        (["--pairs", "0"], "multiple of --batch-size"),
        (["--peer-micro-batch", "3"], "multiple of 3 pairs"),
        (["--peer", "openrlhf"], "invalid choice"),
        (["--shape", "qwen2.5-9b"], "invalid choice"),
    ],
)
def test_impossible_arguments(bench: Any, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.parse_args(words)
    assert message in capsys.readouterr().err


def test_defaults_are_those_of_the_claim(bench: Any) -> None:
    args = bench.parse_args(["--peer", "tunix"])
    assert (args.pairs, args.max_length, args.batch_size, args.dtype) == (16, 512, 4, "float32")
    assert args.peer_micro_batch == 1 and bench.parse_args(["--peer", "trl"]).peer_micro_batch == 4
    assert args.learning_rate == 1e-6 and args.trl_reference == "before" and args.trl_checkpointing == "on"


@pytest.fixture
def task(bench: Any) -> Any:
    pairs = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}]
    return bench.Task("m", pairs, 8, 1, 1, "float32", 1e-6, 0.1, 0)


def test_a_side_that_got_other_ids_is_refused(bench: Any, task: Any, tmp_path: Path) -> None:
    """One id moved from the prompt to the completion is another pair."""
    side = tmp_path / "side.py"
    side.write_text(
        f"import sys; sys.path.insert(0, {str(PEERS)!r})\nfrom handover import hash_pairs, read_task\n"
        "import json; print('noise'); print(json.dumps({'fed': hash_pairs(read_task().pairs)}))\n"
    )
    python = Path(sys.executable)
    assert bench.run_side(str(side), python, task, tmp_path)["fed"] == bench.hash_pairs(task.pairs)
    moved = {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [2, 4, 5]}
    side.write_text(side.read_text().replace("read_task().pairs", f"[{moved}]"))
    with pytest.raises(bench.PeerError, match="other ids than it was handed"):
        bench.run_side(str(side), python, task, tmp_path)
    side.write_text("raise SystemExit(3)")
    with pytest.raises(bench.SideError, match="ended with 3"):
        bench.run_side(str(side), python, task, tmp_path)
    side.write_text("import time; time.sleep(60)")
    with pytest.raises(bench.SideError, match="not done after 0.2 s"):
        bench.run_side(str(side), python, task, tmp_path, 0.2)


def test_what_ours_took_outlives_a_peer_that_fails(
    bench: Any, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    side = {"seconds": 2.0, "device": "cpu", "peak_rss_gb": 1.0, "loss": 0.5}

    def run(script: str, *_: Any) -> dict[str, Any]:
        if script == "ours.py":
            return side
        raise failure

    monkeypatch.setattr(bench, "run_side", run)
    words = ["--peer", "trl", "--peer-python", "p", "--pairs", "4", "--max-length", "64", "--model", str(model_dir)]
    failure = bench.SideError("trl_dpo.py ended with 9")
    assert bench.main(words) == 1
    told = capsys.readouterr()
    line = json.loads(told.out)
    assert line["peer_failed"] == "trl_dpo.py ended with 9" in told.err
    assert (line["pairs_per_s"], line["peer_pairs_per_s"], line["ratio"]) == (2.0, None, None)
    failure = bench.PeerError("its trainer got other ids")  # then neither side's figures are worth anything
    assert bench.main(words) == 2
    assert not capsys.readouterr().out


def test_the_hash_looks_at_pairs_not_at_their_order(bench: Any, task: Any) -> None:
    (first,) = task.pairs
    second = first | {"chosen_ids": [9]}
    assert bench.hash_pairs([first, second]) == bench.hash_pairs([second, first, first])
    assert bench.hash_pairs([first, second]) != bench.hash_pairs([first])


def test_rows_are_padded_where_a_trainer_wants_it(bench: Any) -> None:
    pad_rows = sys.modules["handover"].pad_rows
    ids, mask = pad_rows([[7, 8], [9]], 3, left=True)
    assert ids.tolist() == [[0, 7, 8], [0, 0, 9]] and mask.tolist() == [[0, 1, 1], [0, 0, 1]]
    ids, mask = pad_rows([[7, 8], [9]], 3)
    assert ids.tolist() == [[7, 8, 0], [9, 0, 0]] and mask.tolist() == [[1, 1, 0], [1, 0, 0]]


def test_a_peer_is_installed_once(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environments = sys.modules["environments"]
    installed: list[list[str]] = []

    def make_venv(command: list[str], check: bool) -> None:
        Path(command[-1]).mkdir(parents=True)

    monkeypatch.setattr(environments.subprocess, "run", make_venv)
    monkeypatch.setattr(environments, "install", lambda python, wanted, log: installed.append(wanted))
    monkeypatch.setattr(environments.shutil, "which", lambda name: None)
    for _ in range(2):
        assert bench.peer_python("tunix", tmp_path) == tmp_path / "tunix" / "bin" / "python"
    assert len(installed) == 1 and {"google-tunix==0.1.7", "jax==0.10.2"} <= set(installed[0])
    monkeypatch.setattr(environments.shutil, "which", lambda name: "/bin/nvidia-smi")
    bench.peer_python("tunix", tmp_path)
    assert len(installed) == 2 and "jax[cuda12]==0.10.2" in installed[1]


def test_a_failed_installation_is_not_remembered(bench: Any, tmp_path: Path) -> None:
    environments = sys.modules["environments"]
    with pytest.raises(bench.PeerError, match="pip could not install"):
        environments.install(Path(sys.executable), ["--no-index", "no-such-package-of-ours"], tmp_path / "pip.log")
    assert (tmp_path / "pip.log").exists()


def test_a_task_survives_its_file(bench: Any, task: Any) -> None:
    assert bench.Task(**json.loads(json.dumps(dataclasses.asdict(task)))) == task


def test_environments_of_peers_stay_out_of_git() -> None:
    assert ".venv-peers/" in (REPO / ".gitignore").read_text().splitlines()


# --- attention ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def attention() -> Any:
    spec = importlib.util.spec_from_file_location("bench_attention", REPO / "scripts" / "bench_attention.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_attention"] = module
    spec.loader.exec_module(module)
    return module


def test_a_line_of_the_attention_benchmark(attention: Any, capsys: pytest.CaptureFixture[str]) -> None:
    attention.main(["--heads", "4", "--kv-heads", "2", "--dim", "16", "--tokens", "2048"])
    line = json.loads(capsys.readouterr().out)
    assert line["rows"][1] % 128 == 0 and line["pairs"] > 1 and line["peer"]["rows"] == 2 * line["pairs"]
    assert 0 < line["xla"]["error"] < 1e-5
    assert line["ratio"] == pytest.approx(line["peer"]["both_ms"] / line["xla"]["both_ms"], abs=1e-3)


def test_launches_that_are_tried_are_not_those_of_the_one_before(attention: Any) -> None:
    """jax keeps the program of a function: what is timed must be a new one each time."""
    rows = [jax.ShapeDtypeStruct((1, 256, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    seen = KeyIntervals(*[jax.ShapeDtypeStruct((1, 256), jnp.int32)] * 2)
    function = partial(triton._forward, True)
    launches = [triton._LAUNCHES._replace(forward=triton.Launch(size, size, 4, 1)) for size in (32, 128)]
    texts = [jax.jit(attention.with_launches(function, one)).lower(*rows, seen).as_text() for one in launches]
    again = [jax.jit(function).lower(*rows, seen).as_text() for _ in launches]
    assert texts[0] != texts[1] and again[0] == again[1]


@pytest.mark.parametrize("name", ["checkpoint", "load", "sampler", "step"])
def test_a_model_that_is_not_there_is_one_error(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [f"bench_{name}.py", "--model", "nope"])
    with script_module(REPO / "scripts" / f"bench_{name}.py") as module:
        assert module.main() == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and "nope" in said.err and len(said.err.splitlines()) == 1 and not said.out
