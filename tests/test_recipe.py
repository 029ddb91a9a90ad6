"""The whole recipe on a tiny model: what it leaves behind, that it resumes, and what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from rich.console import Console

import drift_jax.stages.sample as sample_stages
from drift_jax import recipe
from drift_jax.config import RunConfig, build_config
from drift_jax.data.pairs import tokenize_pair
from drift_jax.data.tokenizer import load_tokenizer
from drift_jax.errors import DataError, StageError
from drift_jax.evaluation.preference import preference_numbers
from drift_jax.manifest import Manifest
from drift_jax.recipe import check_run, run
from drift_jax.records import read_pairs
from drift_jax.report.card import render_card
from drift_jax.report.page import render_page
from drift_jax.report.runs import load_run
from drift_jax.sampling.local import LocalSampler
from drift_jax.stages.preference import find_targets, score_targets
from drift_jax.telemetry import read_metrics
from tests.tiny_pairs import build_tiny_policy, write_dsat, write_pairs

STAGES = ["seed/train", "seed/export"] + [
    f"iter_{k}/{stage}" for k in (1, 2) for stage in ("sample", "pair", "train", "export")
]


def make_config(base: Path, run_dir: Path, **changes: dict) -> RunConfig:
    raw = {
        "run_dir": str(run_dir),
        "model": {"path": str(base / "model"), "compute_dtype": "float32", "remat": "none"},
        "data": {
            "dsat": str(base / "dsat.jsonl"),
            "seed_train": str(base / "seed.train.jsonl"),
            "seed_test": str(base / "seed.test.jsonl"),
            "test_rows": 4,
            "max_length": 128,
            "max_prompt_length": 100,
        },
        "recipe": {"iterations": 2, "seed_epochs": 1, "showcase_prompts": ["Hello?"]},
        "sampling": {
            "max_new_tokens": 12,
            "max_input_length": 128,
            "batch_size": 16,
            "compute_dtype": "float32",
            "other_speakers": "keep",  # the model is a random one: it draws control tokens too
        },
        "train": {"batch_size": 8, "learning_rate": 1e-4},
        "checkpoint": {"every_steps": 1, "keep": 1},
        "export": {"dtype": "float32"},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
    }
    for section, keys in changes.items():
        raw[section] |= keys
    return build_config(raw)


def run_quietly(config: RunConfig) -> str:
    out = io.StringIO()
    run(config, Console(file=out, width=160))
    return out.getvalue()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("recipe")
    build_tiny_policy(base / "model", tied=True)
    write_dsat(base / "dsat.jsonl", 16)
    write_pairs(base / "seed.train.jsonl", 8)
    write_pairs(base / "seed.test.jsonl", 4, start=8)
    return base


@pytest.fixture(scope="module")
def finished(base: Path) -> tuple[Path, str]:
    return base / "run", run_quietly(make_config(base, base / "run"))


def test_every_stage_leaves_its_files(finished: tuple[Path, str]) -> None:
    run_dir, output = finished
    manifest = json.loads((run_dir / "manifest.json").read_text())["stages"]
    assert list(manifest) == [*STAGES, "showcase"]
    assert all(entry["finished"] for entry in manifest.values())
    for name in ("seed", "iter_1", "iter_2"):
        for file in ("hf/model.safetensors", "hf/tokenizer.json", "metrics.jsonl", "eval.json", "ref_logps.npz"):
            assert (run_dir / name / file).exists(), f"{name}/{file}"
    assert len(read_pairs(run_dir / "iter_1/pairs.train.jsonl").records) == 12
    assert len(read_pairs(run_dir / "iter_1/pairs.test.jsonl").records) == 4
    assert "margins" in output and str(run_dir / "iter_2/hf") in output.replace("\n", "")
    assert {p.name for p in run_dir.rglob("*") if "tmp" in p.name or "partial" in p.name} == set()


def test_what_a_stage_prefers_is_what_drift_evaluate_finds(finished: tuple[Path, str], base: Path) -> None:
    """Of every stage, against its own reference, on held-out pairs: the exported policies have the same numbers."""
    run_dir, config = finished[0], make_config(base, finished[0])
    targets = find_targets(config, run_dir, None)
    hf = [run_dir / name / "hf" for name in ("seed", "iter_1", "iter_2")]
    assert [(t.policy, t.reference) for t in targets] == [
        (policy, reference) for policy, reference in zip(hf, [base / "model", *hf], strict=False)
    ]
    scored = score_targets(config, targets, run_dir / "iter_2/pairs.test.jsonl", Console(file=io.StringIO()))
    numbers = preference_numbers(scored.of["iter_2"], config.train.beta)
    written = json.loads((run_dir / "iter_2/eval.json").read_text())
    assert written["preference"].pop("reference") == str(hf[1])
    margins = [json.loads(line)["margin"] for line in (run_dir / "iter_2/scores.test.jsonl").read_text().splitlines()]
    assert np.mean(margins) == pytest.approx(written["preference"]["metrics"]["rewards/margins"]["value"], rel=1e-6)
    assert flat(written["preference"]) == pytest.approx(flat(numbers), rel=1e-4, abs=1e-5, nan_ok=True)
    margin = written["preference"]["metrics"]["rewards/margins"]["value"]
    assert margin == pytest.approx(written["eval_rewards/margins"], rel=1e-3, abs=1e-5)
    assert find_targets(config, run_dir / "iter_1", base / "model")[0].reference == base / "model"
    assert flat(written["preference"]) != pytest.approx(
        flat(preference_numbers(scored.of["iter_1"], config.train.beta)), rel=1e-4, abs=1e-5, nan_ok=True
    )


def flat(numbers: dict[str, Any], above: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in numbers.items():
        if isinstance(value, dict):
            found |= flat(value, f"{above}{name}.")
        else:
            found[above + name] = np.nan if value is None else value
    return found


def test_a_reference_that_has_changed_is_refused(finished: tuple[Path, str], base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    shutil.copy(run_dir / "iter_2/hf/model.safetensors", run_dir / "seed/hf/model.safetensors")
    with pytest.raises(StageError, match=r"seed/hf is not what .*iter_1 was trained against.*--reference"):
        find_targets(make_config(base, run_dir), run_dir, None)


def test_metrics_have_the_names_of_trl_and_start_at_ln_2(finished: tuple[Path, str]) -> None:
    rows = read_metrics(finished[0] / "iter_2")
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"}
    assert names | {"logps/rejected", "nll_loss", "grad_norm", "learning_rate"} <= rows[0].keys()
    assert [row["step"] for row in rows] == [1, 2]
    # Of the first update that has a learning rate, how many weights it changed.
    assert "params_changed" not in rows[0] and 0.9 <= rows[1]["params_changed"] <= 1
    assert rows[0]["loss"] - 0.001 * rows[0]["nll_loss"] == pytest.approx(np.log(2), abs=1e-5)


def test_sampled_ids_reach_training_as_they_are(finished: tuple[Path, str]) -> None:
    run_dir, _ = finished
    completions = {row["id"]: row for row in map(json.loads, (run_dir / "iter_1/completions.jsonl").open())}
    tokenizer = load_tokenizer(run_dir / "seed/hf")
    for pair in read_pairs(run_dir / "iter_1/pairs.train.jsonl").records:
        assert pair.meta["chosen_token_ids"] == completions[pair.id]["token_ids"]
        assert tokenize_pair(pair, tokenizer, 100, 128).chosen_ids.tolist() == completions[pair.id]["token_ids"]
        assert pair.meta["finish_reason"] in ("stop", "length") and pair.meta["policy"]


def test_the_second_run_skips_everything(finished: tuple[Path, str], base: Path) -> None:
    run_dir, _ = finished
    before = {p: p.stat().st_mtime_ns for p in run_dir.rglob("*.safetensors")}
    output = run_quietly(make_config(base, run_dir))
    assert output.count("finished before, skipped") == len(STAGES) + 1
    assert {p: p.stat().st_mtime_ns for p in run_dir.rglob("*.safetensors")} == before


def test_a_changed_key_is_refused_with_both_values(finished: tuple[Path, str], base: Path) -> None:
    with pytest.raises(StageError, match=r"(?s)seed/train.*train.beta: was 0.1, is now 0.2.*--run-dir"):
        run(make_config(base, finished[0], train={"beta": 0.2}), Console(file=io.StringIO()))


def test_a_key_that_shapes_nothing_may_change(finished: tuple[Path, str], base: Path) -> None:
    output = run_quietly(make_config(base, finished[0], mesh={"data": 1, "fsdp": 8, "tensor": 1}))
    assert output.count("finished before, skipped") == len(STAGES) + 1


def test_changed_input_is_refused(finished: tuple[Path, str], base: Path, tmp_path: Path) -> None:
    other = write_dsat(tmp_path / "dsat.jsonl", 16, start=1)
    with pytest.raises(StageError, match=r"iter_1/sample.*\n.*input dsat: was"):
        run(make_config(base, finished[0], data={"dsat": str(other)}), Console(file=io.StringIO()))


def test_more_iterations_go_on_from_the_last_policy(finished: tuple[Path, str], base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    before = shown_policy(run_dir)
    # The copied hashes are of other paths, but of the same content.
    config = make_config(base, run_dir, recipe={"iterations": 3})
    output = run_quietly(config)
    assert output.count("finished before, skipped") == len(STAGES)
    assert (run_dir / "iter_3/hf/model.safetensors").exists()
    # What is shown at the end is of the new policy.
    manifest = Manifest(run_dir)
    assert before == manifest.model_hash(run_dir / "iter_2/hf")
    assert shown_policy(run_dir) == manifest.model_hash(run_dir / "iter_3/hf")
    assert list(manifest.stages())[-1] == "showcase" and manifest.is_finished("showcase")
    assert run_quietly(config).count("finished before, skipped") == len(STAGES) + 5


def shown_policy(run_dir: Path) -> str:
    return Manifest(run_dir).inputs("showcase")["after"]


def test_other_prompts_are_shown_anew(finished: tuple[Path, str], base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    output = run_quietly(make_config(base, run_dir, recipe={"showcase_prompts": ["Why?"]}))
    assert output.count("finished before, skipped") == len(STAGES)
    assert [answer["prompt"] for answer in json.loads((run_dir / "showcase.json").read_text())] == ["Why?"]


def test_what_is_gone_is_made_again(finished: tuple[Path, str], base: Path, tmp_path: Path) -> None:
    """By the stage that made it and by no other; completions only where pairs are to be made of them."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    shutil.rmtree(run_dir / "iter_2/hf")
    gone = ("iter_1/pairs.train.jsonl", "iter_1/completions.jsonl", "showcase.json")
    for name in gone:
        (run_dir / name).unlink()
    (run_dir / "iter_2/completions.jsonl").unlink()
    output = run_quietly(make_config(base, run_dir))
    again = ("iter_1/pair", "iter_1/sample", "iter_2/export", "showcase")
    for stage in again:
        assert f"{stage} is to be done again: " in output
    assert output.count("finished before, skipped") == len(STAGES) + 1 - len(again)
    for name in (*gone, "iter_2/hf/model.safetensors"):
        assert (run_dir / name).read_bytes() == (finished[0] / name).read_bytes(), name
    assert not (run_dir / "iter_2/completions.jsonl").exists()
    assert "done again" not in run_quietly(make_config(base, run_dir))


def test_with_reference_initial_every_iteration_is_compared_with_the_first_policy(base: Path, tmp_path: Path) -> None:
    config = make_config(base, tmp_path / "run", recipe={"reference": "initial", "showcase_prompts": []})
    run_quietly(config)
    run_dir, numbers = tmp_path / "run", {}
    for name in ("iter_1", "iter_2"):
        written = json.loads((run_dir / name / "eval.json").read_text())["preference"]
        assert written.pop("reference") == str(base / "model")
        numbers[name] = written
    targets = find_targets(config, run_dir, None)
    assert [target.reference for target in targets[1:]] == [base / "model"] * 2
    pairs = run_dir / "iter_2/pairs.test.jsonl"
    scored = score_targets(config, targets, pairs, Console(file=io.StringIO()))
    found = preference_numbers(scored.of["iter_2"], config.train.beta)
    assert flat(numbers["iter_2"]) == pytest.approx(flat(found), rel=1e-4, abs=1e-5, nan_ok=True)
    # The policy has moved away from it before this iteration: unlike with `previous`, its first loss is not ln 2.
    first = read_metrics(run_dir / "iter_2")[0]
    assert abs(first["loss"] - 0.001 * first["nll_loss"] - np.log(2)) > 1e-3


def test_an_interrupted_sampling_goes_on_from_its_journal(
    finished: tuple[Path, str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after one batch of four, torn line included: the rest is sampled, and the file is the same."""
    config = make_config(
        base, tmp_path / "run", sampling={"batch_size": 4}, data={"seed_train": None}, recipe={"iterations": 1}
    )
    out, quiet = tmp_path / "run/iter_1", Console(file=io.StringIO())
    expected = tmp_path / "expected"
    sample_stages.sample_stage(config, base / "model", str(base / "dsat.jsonl"), expected, quiet, "job")

    def die_after_one_batch(self: object, requests: list, params: object, on_batch: object) -> None:
        real(self, requests[:4], params, on_batch)
        raise KeyboardInterrupt

    real = LocalSampler.sample
    monkeypatch.setattr(LocalSampler, "sample", die_after_one_batch)
    with pytest.raises(KeyboardInterrupt):
        sample_stages.sample_stage(config, base / "model", str(base / "dsat.jsonl"), out, quiet, "job")
    journal = out / "completions.partial.jsonl"
    assert len(journal.read_text().splitlines()) == 4
    with journal.open("a") as file:
        file.write('{"id": "d7", "samp')
    counted = []

    def count(self: object, requests: list, params: object, on_batch: object) -> list:
        counted.append(len(requests))
        return real(self, requests, params, on_batch)

    monkeypatch.setattr(LocalSampler, "sample", count)
    sample_stages.sample_stage(config, base / "model", str(base / "dsat.jsonl"), out, quiet, "job")
    assert counted == [12]
    assert (out / "completions.jsonl").read_bytes() == (expected / "completions.jsonl").read_bytes()


def test_what_was_damaged_between_training_and_export_is_trained_again(
    finished: tuple[Path, str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, looks = make_config(base, tmp_path / "run", recipe={"iterations": 0, "showcase_prompts": []}), []

    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    look = recipe.find_damage
    monkeypatch.setattr(recipe, "find_damage", lambda path: looks.append(path) or look(path))
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(recipe, "export_stage", interrupted)
        run_quietly(config)
    assert not looks, "what was written a moment ago need not be read again"
    checkpoints = tmp_path / "run" / "seed" / "checkpoints"
    newest = max((path for path in checkpoints.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
    victim = max((path for path in newest.glob("*/**/*") if path.is_file()), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    output = run_quietly(config)
    assert "seed/train is to be done again from what is left" in output and len(looks) == 1
    weights = "seed/hf/model.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (finished[0] / weights).read_bytes()
    assert "to be done again" not in run_quietly(config)


def test_a_run_that_holds_nothing_out_comes_to_its_end(base: Path, tmp_path: Path) -> None:
    config = make_config(
        base, tmp_path / "run", data={"seed_train": None, "test_rows": 0}, recipe={"iterations": 1}, train={"epochs": 2}
    )
    output = run_quietly(config)
    assert output.count("data.test_rows is 0: no pair is held out") == 1 and "16 pairs, 0 held out" in output
    assert json.loads((tmp_path / "run/iter_1/eval.json").read_text()) == {"step": 4, "pairs": 0}
    found = load_run(tmp_path / "run")
    assert found.is_finished and "0 held out" in render_page([found])
    assert "| iter_1 | 16 | 4 |" in render_card(found, found.stages[0])
    assert run_quietly(config).count("finished before, skipped") == 5


def test_holding_out_every_row_is_refused(base: Path, tmp_path: Path) -> None:
    config = make_config(base, tmp_path / "run", data={"seed_train": None, "test_rows": 16})
    with pytest.raises(DataError, match="has 16 usable rows and data.test_rows holds 16 of them out"):
        run(config, Console(file=io.StringIO()))


def test_rows_that_were_held_out_are_not_trained_on(base: Path, tmp_path: Path) -> None:
    """Before anything is computed; a run that began before this was looked at goes on as it began."""
    rows = [json.loads(line) for line in (base / "dsat.jsonl").read_text().splitlines()]
    marked = [row | {"meta": {"split": "test" if i < 6 else "train"}} for i, row in enumerate(rows)]
    records = tmp_path / "mined.jsonl"
    records.write_text("".join(json.dumps(row) + "\n" for row in marked))
    config = make_config(base, tmp_path / "run", data={"dsat": str(records), "test_rows": 4})
    model = base / "model"
    with pytest.raises(DataError, match=r"mined.jsonl: 2 of the records to train on were held out .* Set it to 6, or"):
        check_run(config, model)
    check_run(make_config(base, tmp_path / "run", data={"dsat": str(records), "test_rows": 6}), model)
    Manifest(tmp_path / "run").enter("iter_1/sample", {}, {})
    check_run(config, model)
