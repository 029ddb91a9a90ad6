"""`drift evaluate alpaca-eval`: outputs, and the package itself against a server on a free port."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from drift_jax.errors import DriftError
from drift_jax.evaluation import alpaca_eval
from drift_jax.evaluation.alpaca_eval import LC_MISSING, _hash, read_annotator, win_rates
from drift_jax.evaluation.alpaca_length import BASELINE, GAMED, length_controlled
from tests.cli_runs import Drift, drift  # noqa: F401
from tests.http_servers import Answer, serve

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("alpaca_eval") is None, reason="needs the package alpaca-eval (extra alpaca-eval)"
)


def write_outputs(path: Path, generator: str, texts: list[str]) -> Path:
    rows = [
        {"dataset": "own", "instruction": f"Question {i}?", "output": text, "generator": generator}
        for i, text in enumerate(texts)
    ]
    path.write_text(json.dumps(rows))
    return path


def prefers_capital_m(path: str, body: Any) -> Answer:
    """Log-probs of the two names that the package's annotator asks for: M has three times the chance of m."""
    top = [{"token": name, "bytes": [ord(name)], "logprob": math.log(p)} for name, p in (("M", 0.75), ("m", 0.25))]
    choice = {
        "index": 0,
        "finish_reason": "length",
        "message": {"role": "assistant", "content": "M"},
        "logprobs": {"content": [top[0] | {"top_logprobs": top}]},
    }
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    answer = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"]}
    return 200, answer | {"choices": [choice], "usage": usage}


@needs_package
def test_the_package_annotates_and_scores(tmp_path: Path, drift: Drift, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not the variable: where another test has imported the package, it is read already.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    ours = write_outputs(tmp_path / "ours.json", "ours", ["abc" * i + "!" for i in range(12)])
    base = write_outputs(tmp_path / "base.json", "base", ["xy" * i for i in range(11)] + ["abc" * 11 + "!"])
    with serve(prefers_capital_m) as small:
        judge = [f"judge.base_url={small.url}", "judge.model=my-instruct", "judge.api_key_env=JUDGE_KEY"]
        words = [word for key in judge for word in ("--set", key)]
        words += ["--annotate", "--reference-outputs", base, "--out", tmp_path / "out"]
        code, out, err = drift("evaluate", "alpaca-eval", ours, *words)
        assert code == 0, err
        first = len(small.seen)
        assert {(path, body["model"]) for path, body in small.seen} == {("/v1/chat/completions", "my-instruct")}
        report = json.loads((tmp_path / "out/report.json").read_text())
        # The package draws who is m and who is M; equal outputs are a tie to it, without a question.
        annotations = json.loads((tmp_path / "out/annotations.json").read_text())
        values = [row["preference"] for row in annotations]
        assert len(values) == 12 and values[11] == 1.5 and first == 11
        assert {round(value, 6) for value in values[:11]} == {1.25, 1.75}
        assert report["win_rate"] == pytest.approx(100 * (sum(values) / 12 - 1))
        assert (report["model"], report["judge"]) == ("ours", "my-instruct")
        assert report["length_controlled_winrate"] == LC_MISSING and LC_MISSING.split(":")[0] in out.replace("\n", " ")
        # Run again: everything is annotated already.
        assert drift("evaluate", "alpaca-eval", ours, *words)[0] == 0 and len(small.seen) == first
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or "sk-secret" not in path.read_text()
    code, out, _ = drift("evaluate", "alpaca-eval", "--rows", tmp_path / "out/annotations.json")
    assert json.loads(out)["win_rate"] == pytest.approx(report["win_rate"])
    check_package(annotations, report)
    controlled(tmp_path, annotations, base, monkeypatch)


def check_package(annotations: list[dict[str, Any]], report: dict[str, Any]) -> None:
    import pandas as pd
    from alpaca_eval.metrics import get_winrate

    found = get_winrate(pd.DataFrame(annotations))
    for key in ("win_rate", "standard_error", "discrete_win_rate", "n_wins", "n_wins_base", "n_draws", "n_total"):
        assert report[key] == pytest.approx(float(found[key]), abs=1e-9), key


def controlled(tmp_path: Path, annotations: list[dict[str, Any]], base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a df_gamed.csv of the hub's form the package computes the length-controlled win rate from it."""
    import alpaca_eval
    import pandas as pd

    gamed = pd.DataFrame(
        {
            "model": ["g"] * 24,
            "index": list(range(12)) * 2,
            "preference": [0.3, 0.6] * 12,
            "std_delta_len": [-1.0, 1.5, 0.2] * 8,
            "instruction_difficulty": [0.1 * i for i in range(12)] * 2,
            "not_gamed_baseline": [False] * 24,
        }
    )
    file = tmp_path / "df_gamed.csv"
    gamed.to_csv(file, index=False)
    found = length_controlled(alpaca_eval, annotations, base, file)
    assert isinstance(found, float) and 0 < found < 100
    own_index = [row | {"index": 99} for row in annotations]  # not the place, to which difficulties belong
    assert length_controlled(alpaca_eval, own_index, base, file) == found
    # The package takes difficulties by place: of other rows they would be those of other prompts.
    few = length_controlled(alpaca_eval, annotations[3:6], base, file)
    assert few == "not computed: it is of all 12 prompts of the benchmark, and 3 rows are annotated"
    turned = length_controlled(alpaca_eval, annotations[::-1], base, file)
    assert turned == "not computed: row 1 is of another prompt than the benchmark's"
    short = write_outputs(tmp_path / "short.json", "base", ["a", "b", "c"])
    assert length_controlled(alpaca_eval, annotations[:3], short, file) == (
        "not computed: df_gamed.csv is of 12 prompts, the reference outputs are of 3"
    )
    # The hub's difficulties are of the hub's prompts, whatever the model is compared with.
    hub = {GAMED: file, BASELINE: tmp_path / "hub.json"}
    hub[BASELINE].write_text(base.read_text())
    monkeypatch.setattr("drift_jax.evaluation.alpaca_length.hub_file", lambda name: hub[name])
    assert length_controlled(alpaca_eval, annotations, base, None) == found
    rows = json.loads(base.read_text())
    hub[BASELINE].write_text(json.dumps([row | {"instruction": row["instruction"] + "!"} for row in rows]))
    assert "another prompt than the benchmark's" in str(length_controlled(alpaca_eval, annotations, base, None))


@needs_package
def test_another_judge_is_asked_anew(tmp_path: Path, drift: Drift, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the package both are one annotator, whose cache would answer for the second judge."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ours = write_outputs(tmp_path / "ours.json", "ours", ["abc" * i + "!" for i in range(6)])
    base = write_outputs(tmp_path / "base.json", "base", ["xy" * i for i in range(6)])
    words = ["--annotate", "--reference-outputs", base, "--out", tmp_path / "out"]
    with serve(prefers_capital_m) as small:

        def asked_of(model: str) -> list[str]:
            before = len(small.seen)
            judge = ["--set", f"judge.base_url={small.url}", "--set", f"judge.model={model}"]
            code, _, err = drift("evaluate", "alpaca-eval", ours, *words, *judge)
            assert code == 0, err
            return [body["model"] for _, body in small.seen[before:]]

        assert asked_of("one") == ["one"] * 6 and asked_of("two") == ["two"] * 6
        assert asked_of("one") == asked_of("two") == []


def test_annotations_are_kept_by_all_that_they_depend_on(tmp_path: Path) -> None:
    for folder, words in (("a", "Which?"), ("b", "Which?"), ("c", "Which one?")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "prompt.txt").write_text(words)

    def key(folder: str, **kwargs: object) -> str:
        template = str(tmp_path / folder / "prompt.txt")
        return _hash({"mine": {"prompt_template": template, "completions_kwargs": {"model_name": "j", **kwargs}}})

    assert key("a") == key("b") and len(key("a")) == 16  # where the template lies says nothing
    assert len({key("a"), key("c"), key("a", model_name="k"), key("a", temperature=1)}) == 4


def test_prompts_without_output_are_counted(tmp_path: Path, drift: Drift, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alpaca_eval, "check_package", lambda: None)
    monkeypatch.setattr(alpaca_eval, "annotate", lambda *_: win_rates([{"preference": 1.5}]))
    base = write_outputs(tmp_path / "base.json", "base", ["a", "b", "c"])
    ours = write_outputs(tmp_path / "ours.json", "ours", ["a", "b", "c", "d"])
    rows = json.loads(ours.read_text())
    ours.write_text(json.dumps(rows[2:]))
    words = ["--reference-outputs", base, "--out", tmp_path / "out"]
    judge = ["--annotate", "--set", "judge.base_url=http://127.0.0.1:9/v1", "--set", "judge.model=j"]
    for more in ([], judge):
        code, out, err = drift("evaluate", "alpaca-eval", ours, *words, *more)
        assert code == 0, err
        report = json.loads((tmp_path / "out/report.json").read_text())
        assert (report["prompts"], report["without_output"], report["of_no_prompt"]) == (3, 2, 1)
        said = " ".join(out.split())
        assert "2 of 3 prompts have no output and are left out." in said
        assert "1 of 2 outputs belong to no prompt and are left out." in said
    ours.write_text(json.dumps(rows[3:]))
    code, _, err = drift("evaluate", "alpaca-eval", ours, *words)
    assert code == 2 and "belongs to one of the 3 prompts by its instruction" in " ".join(err.split())


def test_outputs_that_are_there_are_not_annotated_unasked(tmp_path: Path, drift: Drift) -> None:
    ours = write_outputs(tmp_path / "ours.json", "ours", ["a", "b"])
    base = write_outputs(tmp_path / "base.json", "base", ["c", "d"])
    code, out, err = drift("evaluate", "alpaca-eval", ours, "--reference-outputs", base, "--out", tmp_path / "out")
    assert code == 0, err
    assert "--annotate compares them" in out


def test_the_report_says_whose_outputs_these_are(tmp_path: Path, drift: Drift, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alpaca_eval, "check_package", lambda: None)
    monkeypatch.setattr(alpaca_eval, "annotate", lambda *_: win_rates([{"preference": 1.5}]))
    ours = write_outputs(tmp_path / "ours.json", "run-iter_2", ["a", "b"])
    words = ["--annotate", "--reference-outputs", ours, "--set", "judge.base_url=http://127.0.0.1:9/v1"]
    words += ["--set", "judge.model=j", "--out", tmp_path / "out"]

    def model_of(*more: object) -> str:
        code, _, err = drift("evaluate", "alpaca-eval", ours, *words, *more)
        assert code == 0, err
        return json.loads((tmp_path / "out/report.json").read_text())["model"]

    assert (model_of(), model_of("--name", "mine")) == ("run-iter_2", "mine")
    rows = json.loads(ours.read_text())
    ours.write_text(json.dumps([row | {"generator": None} for row in rows]))
    assert model_of() == "ours"  # the name of the file
    ours.write_text(json.dumps([row | {"generator": f"m{i}"} for i, row in enumerate(rows)]))
    code, _, err = drift("evaluate", "alpaca-eval", ours, *words)
    assert code == 2 and "holds outputs of several models: m0, m1. Keep those of one" in " ".join(err.split())


@pytest.mark.skipif(importlib.util.find_spec("alpaca_eval") is not None, reason="the package is there")
def test_without_the_package(tmp_path: Path, drift: Drift) -> None:
    ours = write_outputs(tmp_path / "ours.json", "ours", ["a"])
    judge = ["--set", "judge.base_url=http://127.0.0.1:9/v1", "--set", "judge.model=m"]
    words = ["--annotate", "--reference-outputs", ours, "--out", tmp_path / "out", *judge]
    code, _, err = drift("evaluate", "alpaca-eval", ours, *words)
    assert code == 2 and "pip install 'drift-jax[alpaca-eval]'" in " ".join(err.split())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "'mine' is no annotator of alpaca-eval: {path} is not there"),
        ("", "{path} must hold `key: value` lines, found nothing"),
        ("mine: [a", "{path} is not a YAML file"),
        ("{}", "{path} has another form: it: Dictionary should have at least 1 item"),
        ("mine: template", "{path} has another form: mine: Input should be a valid dictionary, found 'template'"),
        ("mine: {completions_kwargs: {}}", "{path} has another form: mine.prompt_template: Field required"),
        (
            "mine: {prompt_template: t, completions_kwargs: 3}",
            "{path} has another form: mine.completions_kwargs: Input",
        ),
    ],
)
def test_what_is_no_annotator(text: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "configs.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(DriftError) as caught:
        read_annotator(tmp_path, "mine")
    assert str(caught.value).startswith(says.format(path=path))
