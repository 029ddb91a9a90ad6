"""Files of alignment-handbook on the command line: as they are, over a CONFIG, and written as one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from drift_jax import handbook as handbook_package
from drift_jax.config import RunConfig, config_to_yaml, load_config
from drift_jax.presets import PRESETS
from tests.cli_runs import Drift, base, change_config, drift, model_dir, write_yaml  # noqa: F401
from tests.tiny_pairs import write_pairs


@pytest.fixture()
def handbook(base: Path) -> Path:
    """A handbook file whose pairs lie in a directory of train.jsonl and test.jsonl."""
    data = base / "data"
    data.mkdir()
    write_pairs(data / "train.jsonl", 8)
    write_pairs(data / "test.jsonl", 4, start=8)
    raw = {
        "model_name_or_path": str(base / "model"),
        "dataset_mixer": {str(data): 1.0},
        "dataset_splits": ["train", "test"],
        "bf16": False,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "linear",
        "rpo_alpha": 0.001,
        "max_length": 192,
        "max_prompt_length": 96,
        "num_train_epochs": 2,
        "optim": "rmsprop",
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "trust_remote_code": True,
        "output_dir": str(base / "handbook"),
    }
    return write_yaml(base / "dpo.yaml", raw)


def test_train_takes_a_handbook_file_as_it_is(drift: Drift, handbook: Path) -> None:
    """Model, pairs and output directory come from the file; the batch is per device, and here are eight of them."""
    code, out, err = drift("train", handbook)
    assert code == 0, err
    assert "never executed" in " ".join(out.split())
    assert "preset paper: template handbook" in out
    rows = [json.loads(line) for line in (handbook.parent / "handbook" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 2]
    assert "eval_rewards/margins" in rows[0] and "eval_rewards/margins" not in rows[1]  # the last is in eval.json
    assert (handbook.parent / "handbook" / "hf" / "model.safetensors").exists()


def test_run_takes_a_handbook_file(drift: Drift, handbook: Path) -> None:
    """Alone its pairs are the seed stage; with a config its hyper-parameters replace the config's."""
    base = handbook.parent
    code, _, err = drift("run", "--handbook", handbook, "--run-dir", base / "alone")
    assert code == 0, err
    assert list(json.loads((base / "alone" / "manifest.json").read_text())["stages"]) == ["seed/train", "seed/export"]
    code, _, err = drift("run", base / "config.yaml", "--handbook", handbook, "--set", "recipe.iterations=1")
    assert code == 0, err
    resolved = yaml.safe_load((base / "handbook" / "config.yaml").read_text())
    assert resolved["train"]["learning_rate"] == 5e-4 and resolved["train"]["epochs"] == 2
    assert resolved["sampling"]["max_new_tokens"] == 4 and resolved["preset"] == "paper"
    assert (base / "handbook" / "iter_1" / "hf" / "model.safetensors").exists()


def test_translate_writes_a_config_that_means_the_same(drift: Drift, handbook: Path, tmp_path: Path) -> None:
    code, out, err = drift("config", "translate", handbook, "--devices", 4, "--set", "train.beta=0.2")
    assert code == 0 and "trust_remote_code" in err
    written = yaml.safe_load(out)
    assert written["train"]["batch_size"] == 4 and written["train"]["beta"] == 0.2
    assert drift("config", "translate", handbook, "--devices", 4, "--out", tmp_path / "ours.yaml")[0] == 0
    config = load_config(tmp_path / "ours.yaml")
    assert config.data.truncation == "trl<=0.11" and config.run_dir == str(handbook.parent / "handbook")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("train", "CONFIG"), "not a handbook file, so --model, --pairs, --out must be given"),
        (("run",), "give a CONFIG"),
        (("config", "translate", "CONFIG"), "there is nothing to translate. `drift run "),
    ],
)
def test_what_is_missing_is_named(drift: Drift, base: Path, command: tuple[str, ...], message: str) -> None:
    code, _, err = drift(*(base / "config.yaml" if word == "CONFIG" else word for word in command))
    assert code == 2 and message in " ".join(err.split())


def test_unknown_handbook_keys_are_all_named(drift: Drift, handbook: Path) -> None:
    handbook.write_text(handbook.read_text() + "betta: 0.1\nfoo: 1\n")
    code, _, err = drift("train", handbook)
    assert code == 2 and "betta: unknown key. Did you mean beta?" in err and "foo: unknown key" in err
    assert not (handbook.parent / "handbook").exists()


# --- drift run CONFIG --handbook FILE --------------------------------------------------------------------------


@pytest.fixture()
def resolved(monkeypatch: pytest.MonkeyPatch, drift: Drift) -> Callable[..., tuple[RunConfig, str]]:
    """What `drift run` would run, and what it printed before."""
    runs: list[RunConfig] = []
    monkeypatch.setattr("drift_jax.recipe.run", lambda config, console, part: runs.append(config))
    monkeypatch.setenv("COLUMNS", "600")  # every row of the table in one line

    def call(*words: object) -> tuple[RunConfig, str]:
        code, out, err = drift("run", *words)
        assert code == 0, err
        return runs[-1], " ".join(out.split())

    return call


Resolved = Callable[..., tuple[RunConfig, str]]


@pytest.mark.parametrize(
    ("mesh", "change", "batch"),
    [
        ({}, None, 8),
        ({"tensor": 2}, None, 4),
        ({"tensor": 2}, "mesh.tensor=4", 2),
        ({"fsdp": 2, "tensor": -1}, None, 2),
    ],
    ids=str,
)
def test_the_batch_of_a_handbook_file_is_per_device_of_the_whole_config(
    resolved: Resolved, handbook: Path, mesh: dict, change: str | None, batch: int
) -> None:
    config = change_config(handbook.parent / "config.yaml", mesh=mesh)
    found, _ = resolved(config, "--handbook", handbook, *(("--set", change) if change else ()))
    assert found.train.batch_size == batch


def test_accumulation_by_option_is_checked_against_the_batch_of_all_devices(resolved: Resolved, handbook: Path) -> None:
    config = handbook.parent / "config.yaml"
    assert resolved(config, "--handbook", handbook, "--set", "train.accumulation_steps=8")[0].train.batch_size == 8


def test_the_preset_of_a_handbook_file_replaces_all_that_presets_decide(resolved: Resolved, handbook: Path) -> None:
    """A CONFIG with every key written out, such as RUN/config.yaml, must not keep its preset through the back door."""
    path = handbook.parent / "config.yaml"
    path.write_text(config_to_yaml(load_config(path, ["train.warmup_steps=7", "train.max_steps=3"])))
    found, out = resolved(path, "--handbook", handbook)
    values = dataclasses.asdict(found)
    for key, value in PRESETS["paper"].items():
        section, leaf = key.split(".")
        assert values[section][leaf] == value, key
    assert found.preset == "paper" and (found.train.warmup_steps, found.train.max_steps) == (None, None)
    assert "pairs are not read from this file" in out
    found, _ = resolved(path, "--handbook", handbook, "--set", "data.eos=append", "--set", "preset=trl1")
    assert (found.data.eos, found.data.template) == ("append", PRESETS["trl1"]["data.template"])


def test_records_go_on_without_a_seed_where_the_file_names_no_pairs(
    drift: Drift, resolved: Resolved, handbook: Path
) -> None:
    raw = yaml.safe_load(handbook.read_text())
    handbook.write_text(yaml.safe_dump({k: v for k, v in raw.items() if not k.startswith("dataset_")}))
    found, _ = resolved("--handbook", handbook, "--set", f"data.dsat={handbook.parent / 'dsat.jsonl'}")
    assert found.data.seed_train is None and found.recipe.iterations == 2
    code, _, err = drift("run", "--handbook", handbook)
    assert code == 2 and "the file names no pairs" in " ".join(err.split())


@pytest.mark.parametrize("name", ["a b #c", "2024", ":train:", 'it\'s "é"', "[x]", "null"])
def test_a_path_given_by_option_is_taken_as_it_is(resolved: Resolved, handbook: Path, name: str) -> None:
    config = handbook.parent / "config.yaml"
    assert resolved(config, "--run-dir", name)[0].run_dir == name
    data = handbook.parent / "data"
    moved = data.rename(handbook.parent / name)
    raw = yaml.safe_load(handbook.read_text()) | {"dataset_mixer": {str(moved): 1.0}}
    handbook.write_text(yaml.safe_dump(raw))
    found, out = resolved("--handbook", handbook, "--run-dir", handbook.parent / "run" / name)
    assert found.data.seed_train == str(handbook.parent / "run" / name / "data" / "pairs.train.jsonl")
    assert found.recipe.iterations == 0 and f"100 % of {moved} " in out


@pytest.mark.parametrize("words", [("run", "FILE"), ("run", "FILE", "--handbook", "FILE"), ("sample", "FILE")], ids=str)
def test_a_handbook_file_in_place_of_a_config_is_named(drift: Drift, handbook: Path, words: tuple[str, ...]) -> None:
    rest = ("--model", "m", "--input", "i", "--out", handbook.parent / "o") if words[0] == "sample" else ()
    code, _, err = drift(*(handbook if word == "FILE" else word for word in words), *rest)
    assert code == 2 and f"drift run --handbook {handbook}" in " ".join(err.split()) and "unknown key" not in err


def test_a_handbook_file_without_a_model_says_which_key_is_missing(drift: Drift, handbook: Path) -> None:
    raw = yaml.safe_load(handbook.read_text())
    del raw["model_name_or_path"]
    handbook.write_text(yaml.safe_dump(raw))
    code, _, err = drift("train", handbook)
    assert code == 2 and "model_name_or_path: this key is required" in " ".join(err.split())


def test_a_handbook_file_is_translated_once(
    drift: Drift, resolved: Resolved, handbook: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    translate = handbook_package.translate_handbook

    def count(path: Path, devices: int) -> handbook_package.Translation:
        counts.append(devices)
        return translate(path, devices)

    monkeypatch.setattr(handbook_package, "translate_handbook", count)
    assert drift("config", "translate", handbook, "--set", "mesh.tensor=2")[0] == 0
    resolved("--handbook", handbook, "--set", "mesh.tensor=4")
    resolved(handbook.parent / "config.yaml", "--handbook", handbook)
    assert counts == [4, 2, 8]


@pytest.mark.parametrize("words", [("plan", "--devices", 1), ("data", "inspect")], ids=["plan", "inspect"])
def test_a_handbook_file_is_called_one(drift: Drift, handbook: Path, words: tuple[object, ...]) -> None:
    code, _, err = drift(*words, handbook)
    assert code == 2 and "dpo.yaml is a file of alignment-handbook. `drift run --handbook" in " ".join(err.split())
    assert "unknown key" not in err


@pytest.mark.parametrize("words", [("config", "translate"), ("run", "--handbook")], ids=["translate", "run"])
def test_a_config_of_ours_is_called_one(drift: Drift, base: Path, words: tuple[object, ...]) -> None:
    code, _, err = drift(*words, base / "config.yaml")
    said = " ".join(err.split())
    assert code == 2 and "config.yaml is a config of drift_jax already (it has data, model, recipe, run_dir," in said
    assert "unknown key" not in said
