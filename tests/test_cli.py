"""The command as a person types it: help, and exit code 2 with one clear message for what they can mend."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from drift_jax.cli import main
from drift_jax.config import RunConfig, config_to_yaml, load_config
from drift_jax.presets import PRESETS
from tests.tiny_pairs import build_tiny_policy, write_dsat, write_pairs

Drift = Callable[..., tuple[int, str, str]]


@pytest.fixture()
def drift(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Drift:
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["drift", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_policy(tmp_path_factory.mktemp("cli") / "model", tied=True)


@pytest.fixture()
def base(tmp_path: Path, model_dir: Path) -> Path:
    """A directory with everything `drift run config.yaml` needs."""
    shutil.copytree(model_dir, tmp_path / "model")
    write_dsat(tmp_path / "dsat.jsonl", 16)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    write_pairs(pairs / "pairs.train.jsonl", 8)
    raw = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tmp_path / "model"), "compute_dtype": "float32"},
        "data": {"dsat": str(tmp_path / "dsat.jsonl"), "test_rows": 4, "max_length": 128, "max_prompt_length": 64},
        "recipe": {"iterations": 1},
        "sampling": {"max_new_tokens": 4, "batch_size": 8, "compute_dtype": "float32", "max_input_length": 128},
        "train": {"batch_size": 8},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path


def test_help_lists_every_command(drift: Drift) -> None:
    code, out, _ = drift("--help")
    assert code == 0
    for command in ("run", "sample", "train", "export", "presets", "config", "doctor"):
        assert command in out
        assert drift(command, "--help")[0] == 0


def edit_rows(path: Path, line: int, edit: Callable[[dict], object]) -> None:
    rows = path.read_text().splitlines()
    row = json.loads(rows[line - 1])
    changed = edit(row)
    rows[line - 1] = changed if isinstance(changed, str) else json.dumps(row)
    path.write_text("\n".join(rows) + "\n")


def run_refused(drift: Drift, base: Path, *words: object) -> str:
    """The message of a `drift run` that must fail before anything was made."""
    code, _, err = drift("run", base / "config.yaml", *words)
    assert code == 2, err
    assert err.startswith("error:")
    assert "Traceback" not in err
    left = {p.name for p in (base / "run").rglob("*")} if (base / "run").exists() else set()
    assert not left & {"hf", "completions.jsonl", "pairs.train.jsonl"}, left
    return err.replace("\n", " ")


@pytest.mark.parametrize(
    "edit,words",
    [
        (lambda row: "{not json", "dsat.jsonl:3: not JSON"),
        (lambda row: row.pop("rejected"), "dsat.jsonl:3: missing rejected"),
        (lambda row: row["prompt"][0].update(role="assistant"), "dsat.jsonl:3: prompt roles"),
        (lambda row: row["rejected"][0].update(content=" "), "dsat.jsonl:3: rejected[0].content is empty"),
        (lambda row: row.update(id="d0"), "dsat.jsonl:3: id 'd0' is already the id of line 1"),
    ],
)
def test_bad_rows(drift: Drift, base: Path, edit: Callable[[dict], object], words: str) -> None:
    edit_rows(
        base / "dsat.jsonl", 3, lambda row: edit(row) if isinstance(edit(dict(row)), str) else (edit(row), None)[1]
    )
    assert words in run_refused(drift, base)


def test_bad_rows_are_reported_together_and_can_be_skipped(drift: Drift, base: Path) -> None:
    for line in (2, 5):
        edit_rows(base / "dsat.jsonl", line, lambda row: "[]")
    message = run_refused(drift, base)
    assert "dsat.jsonl:2" in message and "dsat.jsonl:5" in message and "--on-bad-row skip" in message
    code, _, err = drift(
        "sample", base / "config.yaml", "--model", base / "model", "--input", base / "dsat.jsonl",
        "--out", base / "out", "--on-bad-row", "skip",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads((base / "out/drops.json").read_text())["counts"]["bad row"] == 2
    assert len((base / "out/pairs.train.jsonl").read_text().splitlines()) == 10


def test_a_pair_without_chosen(drift: Drift, base: Path) -> None:
    edit_rows(base / "pairs/pairs.train.jsonl", 2, lambda row: row.pop("chosen"))
    words = ("train", base / "config.yaml", "--model", base / "model", "--pairs", base / "pairs", "--out", base / "out")
    code, _, err = drift(*words)
    assert code == 2 and "pairs.train.jsonl:2: missing chosen" in err.replace("\n", "")
    assert not (base / "out").exists()


def test_a_git_lfs_pointer(drift: Drift, base: Path) -> None:
    (base / "dsat.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in run_refused(drift, base)


@pytest.mark.parametrize(
    "override,words",
    [
        ("train.betta=0.1", "train.betta: unknown key. Did you mean train.beta?"),
        ("train.beta=lots", "train.beta: Input should be a valid number, found 'lots'"),
        ("data.max_prompt_length=128", "data.max_prompt_length (128) must be below data.max_length (128)"),
        ("train.batch_size=12", "12 pairs cannot be split over 8 devices"),
        ("sampling.batch_size=12", "sampling.batch_size (12) cannot be split over 8 devices"),
        ("mesh.tensor=3", "8 devices cannot be divided by 3"),
        ("data.dsat=nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("tracking.trackers=[mlflow]", "tracking.trackers.0"),
    ],
)
def test_bad_config(drift: Drift, base: Path, override: str, words: str) -> None:
    assert words in run_refused(drift, base, "--set", override)


def test_no_config_and_no_model(drift: Drift, base: Path) -> None:
    assert "no config file" in drift("run", base / "nothing.yaml")[2]
    assert "no model directory" in run_refused(drift, base, "--set", f"model.path={base / 'nothing'}").replace(
        "  ", " "
    )


def remove_weights(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def truncate_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def change_architecture(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "gpt2"}))


def shrink_vocabulary(model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))


@pytest.mark.parametrize(
    "spoil,words",
    [
        (remove_weights, "pytorch_model.bin: pickles can run code"),
        (truncate_weights, "not a whole safetensors file"),
        (change_architecture, "architecture 'gpt2'"),
        (shrink_vocabulary, "the model has embeddings for 100"),
    ],
)
def test_bad_models(drift: Drift, base: Path, spoil: Callable[[Path], None], words: str) -> None:
    spoil(base / "model")
    assert words in run_refused(drift, base)


def test_markup_in_a_message_stays_text(drift: Drift, base: Path) -> None:
    assert "[bold]" in run_refused(drift, base, "--set", "train.optimizer='[bold]x'")


def test_train_and_export_alone(drift: Drift, base: Path) -> None:
    code, _, err = drift(
        "train", base / "config.yaml", "--model", base / "model", "--pairs", base / "pairs", "--out", base / "out"
    )
    assert code == 0, err
    assert (base / "out/hf/model.safetensors").exists()
    code, _, err = drift("export", base / "out/checkpoints", "--model", base / "model", "--out", base / "again")
    assert code == 0, err
    assert (base / "again/config.json").exists()
    code, _, err = drift("export", base / "model", "--model", base / "model", "--out", base / "third")
    assert code == 2 and "holds no whole checkpoint" in err.replace("\n", " ")


def test_sampling_into_a_directory_of_another_model_is_refused(drift: Drift, base: Path) -> None:
    """Otherwise completions of the old policy would be taken for the new one's."""
    words = ("sample", base / "config.yaml", "--input", base / "dsat.jsonl", "--out", base / "out")
    assert drift(*words, "--model", base / "model")[0] == 0
    written = (base / "out/completions.jsonl").stat().st_mtime_ns
    assert drift(*words, "--model", base / "model")[0] == 0
    assert (base / "out/completions.jsonl").stat().st_mtime_ns == written
    build_tiny_policy(base / "other", tied=False)
    code, _, err = drift(*words, "--model", base / "other")
    assert code == 2 and "input policy: was" in err
    code, _, err = drift(*words, "--model", base / "model", "--set", "sampling.seed=1")
    assert code == 2 and "sampling.seed: was 42, is now 1" in err


def test_a_refused_call_leaves_the_config_of_the_run(drift: Drift, base: Path) -> None:
    words = ("run", base / "config.yaml", "--set", "recipe.iterations=0", "--set", "mesh.data=8")
    seed = ("--set", f"data.seed_train={base / 'pairs/pairs.train.jsonl'}", "--set", "recipe.seed_epochs=1")
    assert drift(*words, *seed)[0] == 0
    before = (base / "run/config.yaml").read_text()
    code, _, err = drift(*words, *seed, "--set", "train.beta=0.5")
    assert code == 2 and "train.beta: was 0.1, is now 0.5" in err
    assert (base / "run/config.yaml").read_text() == before


# --- presets and handbook files -------------------------------------------------------------------------------


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
    path = base / "dpo.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_presets_are_explained(drift: Drift) -> None:
    code, out, _ = drift("presets")
    assert code == 0
    for word in ("drift", "paper", "trl1", "generation_prompt", "trl0.12.0-0.12.2", "group_token_mean", "nonzero"):
        assert word in out


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
        (("config", "translate", "CONFIG"), "model_name_or_path: this key is required"),
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


def test_pairs_without_a_completion_left_are_counted_and_named(drift: Drift, base: Path) -> None:
    """Preset trl1 drops pairs whose prompt fills max_length, as TRL does; nothing is dropped silently."""
    rows = [json.loads(line) for line in (base / "pairs" / "pairs.train.jsonl").open()]
    rows[3]["prompt"][0]["content"] = "Why? " * 100
    (base / "pairs" / "pairs.train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = drift(
        "train", base / "config.yaml", "--model", base / "model", "--pairs", base / "pairs", "--out", base / "out",
        "--set", "preset=trl1", "--set", "train.warmup_ratio=0",
    )  # fmt: skip
    assert code == 0, err
    assert "1 of 8 train pairs (12.5%) lost a completion" in " ".join(out.split()) and "s3" in out
    stages = json.loads((base / "out" / "manifest.json").read_text())["stages"]
    summary = stages["train"]["summary"]
    assert summary["pairs"] == 7 and summary["drops"] == {"not encodable": 0, "completion cut away": 1}
    assert len(summary["warnings"]) == 1


# --- drift run CONFIG --handbook FILE --------------------------------------------------------------------------


@pytest.fixture()
def resolved(monkeypatch: pytest.MonkeyPatch, drift: Drift) -> Callable[..., tuple[RunConfig, str]]:
    """What `drift run` would run, and what it printed before."""
    runs: list[RunConfig] = []
    monkeypatch.setattr("drift_jax.recipe.run", lambda config, console: runs.append(config))
    monkeypatch.setenv("COLUMNS", "600")  # every row of the table in one line

    def call(*words: object) -> tuple[RunConfig, str]:
        code, out, err = drift("run", *words)
        assert code == 0, err
        return runs[-1], " ".join(out.split())

    return call


Resolved = Callable[..., tuple[RunConfig, str]]


def change_config(path: Path, **sections: object) -> Path:
    raw = yaml.safe_load(path.read_text())
    for key, value in sections.items():
        raw[key] = raw.get(key, {}) | value if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(raw))
    return path


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


def test_paths_in_messages_keep_their_colons(drift: Drift, base: Path) -> None:
    assert "/:train:.yaml" in drift("run", base / ":train:.yaml")[2].replace("\n", "")


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


def test_the_revision_is_that_of_the_models_own_path(monkeypatch: pytest.MonkeyPatch, drift: Drift, base: Path) -> None:
    asked: list[tuple[str, str | None]] = []

    def resolve(model: str, revision: str | None = None) -> Path:
        asked.append((model, revision))
        return base / "model"

    monkeypatch.setattr("drift_jax.models.hf.resolve_model", resolve)
    config = change_config(base / "config.yaml", model={"path": "org/one", "revision": "abc"})
    words = ("train", config, "--pairs", base / "nothing", "--out", base / "out")
    assert drift(*words, "--model", "org/one", "--reference", "org/two")[0] == 2  # there are no pairs
    assert drift(*words, "--model", "org/two", "--reference", "org/one")[0] == 2
    assert asked == [("org/one", "abc"), ("org/two", None), ("org/two", None), ("org/one", "abc")]
