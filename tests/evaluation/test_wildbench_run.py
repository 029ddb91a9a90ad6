"""`drift evaluate wildbench` from end to end: a tiny model answers, a server on a free port judges."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from drift_jax.evaluation.wildbench_judge import SCORE_TEMPLATE, fill, load_template, seat, shorten
from drift_jax.evaluation.wildbench_rows import load_tasks
from tests.cli_runs import REPO, Drift, drift, model_dir  # noqa: F401
from tests.http_servers import serve
from tests.wildbench_files import judge_of, write_checkout, write_outputs, write_tasks

SAMPLING = ("--set", "sampling.max_new_tokens=4", "--set", "sampling.compute_dtype=float32")


def verdict(prompt: str) -> dict[str, Any] | str:
    """Of a score by the task's number, of a pair the longer one; tasks 3 and 11 get no usable answer."""
    found = re.search(r"Say number (\d+)\.", prompt)
    assert found is not None
    number = int(found[1])
    if "Score it" in prompt:
        if number in (3, 11):
            return "The reply is fine." if number == 3 else '{"strengths": "", "weaknesses": "", "score": "eleven"}'
        return {"strengths": "-", "weaknesses": "-", "score": str(number % 10 + 1)}
    a, b = re.search(r"A: (.*?)\n--\nB: (.*?)\n--\n", prompt, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return {"reason": "-", "choice": "A=B" if len(a) == len(b) else "A+" if len(a) > len(b) else "B++"}


def options(tmp_path: Path, url: str) -> list[object]:
    files = ["--tasks", write_tasks(tmp_path / "tasks.json"), "--wildbench", tmp_path / "WildBench"]
    judge = ["--set", f"judge.base_url={url}", "--set", "judge.model=judge-1", "--set", "judge.concurrency=2"]
    return [*files, *judge, "--out", tmp_path / "out"]


@pytest.mark.slow
def test_sixteen_tasks_killed_half_way_and_resumed(tmp_path: Path, drift: Drift, model_dir: Path) -> None:
    write_checkout(tmp_path / "WildBench")
    with serve(judge_of(verdict), delay_s=0.1) as small:
        words = ["evaluate", "wildbench", model_dir, "--name", "tiny", *SAMPLING, *options(tmp_path, small.url)]
        verdicts = tmp_path / "out/verdicts.jsonl"
        command = [sys.executable, "-m", "drift_jax", *map(str, words)]
        log = tmp_path / "log.txt"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}
            )
        try:
            deadline = time.monotonic() + 240
            while not (verdicts.exists() and verdicts.read_bytes().count(b"\n") >= 6):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        done = verdicts.read_bytes().count(b"\n")
        assert 6 <= done < 14 and not (tmp_path / "out/report.json").exists()
        outputs = (tmp_path / "out/completions.jsonl").read_bytes()
        before = len(small.seen)
        code, out, err = drift(*words)
        assert code == 0, err
        # What was judged is not asked again; the two without a usable answer three times each.
        assert len(small.seen) - before == 14 - done + 2 * 3
    assert (tmp_path / "out/completions.jsonl").read_bytes() == outputs
    assert "2 left out" in out and "answering with model: 0/0" in out
    report = json.loads((tmp_path / "out/report.json").read_text())
    counted = report["judging"]["score"]
    assert (counted["questions"], counted["failed"], counted["from_cache"]) == (16, 2, done)
    assert counted["malformed_answers"] == 6
    numbers = [i for i in range(16) if i not in (3, 11)]
    assert report["score"]["total"] == 14
    assert report["score"]["score"] == pytest.approx(sum(i % 10 + 1 for i in numbers) / 14)
    template = load_template(SCORE_TEMPLATE, tmp_path / "WildBench")
    assert report["templates"] == {"score": template.hash} and report["judge"] == "judge-1"
    assert f"Template of score: {template.hash}" in (tmp_path / "out/report.md").read_text()
    check_upstream_rows(json.loads((tmp_path / "out/score.v2/eval=judge-1/tiny.json").read_text()))
    code, out, err = drift(
        "evaluate", "wildbench", "--rows", tmp_path / "out/score.v2/eval=judge-1/tiny.json", "--tasks",
        tmp_path / "tasks.json",
    )  # fmt: skip
    again = json.loads(out)
    assert {key: again[key] for key in report["score"]} == report["score"]


def check_upstream_rows(rows: list[dict[str, Any]]) -> None:
    """What upstream's `_create_tables.py` and `wb_elo.py` read of a row."""
    assert len(rows) == 14
    for row in rows:
        assert row["model_test"] == "tiny" and float(row["score"]) == float(row["parsed_result"]["score"])
        assert isinstance(row["model_output"], str) and row["session_id"].startswith("task")
        assert row["meta_data"]["usage"]["total_tokens"] == 110


def test_outputs_of_a_file_against_references(tmp_path: Path, drift: Drift) -> None:
    """Empty outputs cost no question; a reference is named, or found in its file; templates of both are named."""
    write_checkout(tmp_path / "WildBench")
    ours = write_outputs(tmp_path / "ours.json", "org/ours", {i: "x" * (10 * i) for i in range(15)})
    other = write_outputs(tmp_path / "other.json", "other", {i: "y" * 30 for i in range(16)})
    with serve(judge_of(verdict)) as small:
        llama = write_outputs(tmp_path / "llama.json", "meta/llama", {i: "z" * 45 for i in range(16)})
        words = ["--reference", other, "--reference", f"Llama-2-70b-chat-hf={llama}"]
        words += ["--against", tmp_path / "scores.json"]
        (tmp_path / "scores.json").write_text(
            json.dumps([{"session_id": f"task{i:02}", "score": "1", "out_len": 3} for i in range(16)])
        )
        code, out, err = drift("evaluate", "wildbench", ours, *options(tmp_path, small.url), *words)
        assert code == 0, err
        pairs = [body for _, body in small.seen if "Which?" in body["messages"][0]["content"]]
    assert len(pairs) == 2 * 14
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["model"] == "org/ours"
    assert report["without_output"] == 1 and report["score"]["empty"] == 1
    row = report["rewards"]["other"]
    # Empty: out of the counts, in the denominator. 30 characters: equal. Who is A and who is B changes what the judge
    # here says (A+ or B++), and never who wins.
    assert (row["total"], row["tie"]) == (15, 1)
    assert row["win"] + row["win_much"] == 11 and row["lose"] + row["lose_much"] == 2
    assert row["win"] and row["win_much"]
    mixture = report["mixture"]
    assert mixture["mixture_of_rewards.K=500"] == pytest.approx(
        50 * (row["reward"] + report["rewards"]["Llama-2-70b-chat-hf"]["reward"])
    )
    assert set(report["templates"]) == {"score", "pairwise"} and set(report["wb_elo"]) == {"org/ours", "scores"}
    assert "WB-Reward" in out and "Elo-style ratings" in out
    path = tmp_path / "out/pairwise.v2/eval=judge-1/ref=other/ours.json"
    rows = json.loads(path.read_text())
    assert rows[0]["model_outputs"]["org/ours"] == "[This model response is empty.]"
    assert {(r["model_A"], r["model_B"]) for r in rows} == {("org/ours", "other"), ("other", "org/ours")}
    code, out, err = drift("evaluate", "wildbench", "--rows", path, "--reference", "other")
    assert code == 0 and json.loads(out)["reward"] == row["reward"], err


def test_a_reference_against_itself_is_nothing(tmp_path: Path, drift: Drift) -> None:
    write_checkout(tmp_path / "WildBench")
    ours = write_outputs(tmp_path / "ours.json", "gpt-4-turbo-2024-04-09", {i: "fine" for i in range(16)})
    other = write_outputs(tmp_path / "other.json", "claude-3-haiku-20240307", {i: "ok" for i in range(16)})
    with serve(judge_of(verdict)) as small:
        words = ["--reference", ours, "--reference", other]
        code, _, err = drift("evaluate", "wildbench", ours, *options(tmp_path, small.url), *words)
    assert code == 0, err
    report = json.loads((tmp_path / "out/report.json").read_text())
    (reward,) = [row["reward"] for row in report["rewards"].values()]
    assert reward > 0 and report["mixture"]["mixture_of_rewards.K=500"] == pytest.approx(100 * reward / 2)
    assert report["mixture"]["gpt4t_reward.K=500"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--wildbench": "nowhere"}, "holds no evaluation/eval_template.score.v2.md"),
        ({"--tasks": "bad"}, "1 of 1 tasks cannot be used"),
        ({"--out": None}, "--out DIR must be given"),
    ],
)
def test_what_is_missing_is_said_first(
    tmp_path: Path, drift: Drift, change: dict[str, str | None], message: str
) -> None:
    write_checkout(tmp_path / "WildBench")
    ours = write_outputs(tmp_path / "ours.json", "ours", {0: "x"})
    (tmp_path / "bad").write_text('[{"session_id": "a"}]')
    words = options(tmp_path, "http://127.0.0.1:9/v1")
    for option, value in change.items():
        place = words.index(option)
        words[place : place + 2] = [option, tmp_path / value] if value else []
    code, _, err = drift("evaluate", "wildbench", ours, *words)
    assert code == 2 and message in " ".join(err.split())
    assert not (tmp_path / "out").exists()


def test_a_judge_without_one_usable_answer_is_reported(tmp_path: Path, drift: Drift) -> None:
    write_checkout(tmp_path / "WildBench")
    ours = write_outputs(tmp_path / "ours.json", "ours", {i: "fine" for i in range(3)})
    with serve(judge_of(lambda _: "I like it.")) as small:
        code, out, err = drift("evaluate", "wildbench", ours, *options(tmp_path, small.url))
    assert code == 0, err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["score"]["score"] is None and report["score"]["total"] == 0 and report["wb_elo"] is None
    assert report["judging"]["score"]["failed"] == 3 and "3 left out, 9 malformed answers" in " ".join(out.split())


def test_no_judge_is_named(tmp_path: Path, drift: Drift) -> None:
    ours = write_outputs(tmp_path / "ours.json", "ours", {0: "x"})
    code, _, err = drift("evaluate", "wildbench", ours, "--out", tmp_path / "out")
    assert code == 2 and "no judge is named" in err


def test_prompts_of_the_judge(tmp_path: Path) -> None:
    """Texts of users and models are put in as they are: what looks like a gap of the template stays text."""
    tasks = load_tasks(write_tasks(tmp_path / "tasks.json"))
    template = load_template(SCORE_TEMPLATE, write_checkout(tmp_path / "WildBench"))
    text = fill(template, tasks[1], model_output="{$checklist} {$history} \\1")
    assert "USER: Hi.\n\nASSISTANT: Hello.\n\n" in text and "Asked: Say number 1." in text
    assert "Reply: {$checklist} {$history} \\1\n" in text and "- Is 1 said?\n- Is it polite?\n" in text
    assert shorten(" ".join(["w"] * 1000)) == " ".join(["w"] * 1000)
    assert shorten(" ".join(["w"] * 1001)) == " ".join(["w"] * 1000) + "... (truncated)"
    first = {seat(task, "m", "r").a for task in tasks}
    assert first == {"m", "r"} and seat(tasks[0], "m", "r") == seat(tasks[0], "m", "r")


def test_a_model_answers_other_prompts(tmp_path: Path, drift: Drift, model_dir: Path) -> None:
    """The same model on both sides is sampled once; the other benchmark's outputs are written and not compared."""
    prompts = [{"instruction": f"Say number {i}.", "output": "", "generator": "base"} for i in range(16)]
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    check = ["--judge", "programmatic", "--check", "drift_jax.evaluation.checks:shorter"]
    words = [*SAMPLING, "--prompts", tmp_path / "prompts.json", "--out", tmp_path / "out", *check]
    code, out, err = drift("evaluate", "win-rate", model_dir, model_dir, *words)
    assert code == 0, err
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert found["win_rate"] == 50 and found["ties"] == 16 and found["win_rate_interval"] == [50, 50]
    assert "answering with model: 16/16" in out and not (tmp_path / "out/b").exists()
    words = [
        *SAMPLING,
        "--reference-outputs",
        tmp_path / "prompts.json",
        "--out",
        tmp_path / "alpaca",
        "--name",
        "tiny",
    ]
    code, out, err = drift("evaluate", "alpaca-eval", model_dir, *words)
    assert code == 0, err
    rows = json.loads((tmp_path / "alpaca/model_outputs.json").read_text())
    assert [row["instruction"] for row in rows] == [prompt["instruction"] for prompt in prompts]
    assert {row["generator"] for row in rows} == {"tiny"} and all(isinstance(row["output"], str) for row in rows)
