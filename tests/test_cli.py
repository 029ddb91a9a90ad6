"""The command as a person types it: help, and exit code 2 with one clear message for what they can mend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli_runs import Drift, base, change_config, drift, model_dir  # noqa: F401
from tests.tiny_pairs import build_tiny_policy, write_pairs

COMMANDS = ("run", "sample", "train", "export", "mesh", "mine", "data", "presets", "config", "report", "card", "doctor")
CHOICES = ("drift", "paper", "trl1", "generation_prompt", "trl0.12.0-0.12.2", "group_token_mean", "nonzero")


@pytest.mark.parametrize(("command", "names"), [("--help", COMMANDS), ("presets", CHOICES)], ids=["help", "presets"])
def test_a_list_is_complete(drift: Drift, command: str, names: tuple[str, ...]) -> None:
    code, out, _ = drift(command)
    assert code == 0 and [name for name in names if name not in out] == []


def test_every_command_has_help(drift: Drift) -> None:
    assert [drift(command, "--help")[0] for command in COMMANDS] == [0] * len(COMMANDS)


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
    edit_rows(base / "dsat.jsonl", 2, lambda row: row.update(rejected=3, user_preference=4))  # twice, and one row
    edit_rows(base / "dsat.jsonl", 5, lambda row: "[]")
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


def test_an_empty_file_of_held_out_pairs_holds_none_out(drift: Drift, base: Path) -> None:
    """As `drift sample` writes it; of pairs to train on it is an error."""
    (base / "pairs/pairs.test.jsonl").touch()
    words = ("train", base / "config.yaml", "--model", base / "model", "--pairs", base / "pairs", "--out", base / "out")
    code, out, err = drift(*words)
    assert code == 0, err
    assert " ".join(out.split()).count("pairs.test.jsonl is empty: no pairs are held out") == 1
    assert json.loads((base / "out/eval.json").read_text()) == {"step": 1, "pairs": 0}
    (base / "pairs/pairs.train.jsonl").write_text("")
    code, _, err = drift(*words[:-1], base / "other")
    assert code == 2 and "pairs.train.jsonl is empty: at least one row is needed" in " ".join(err.split())
    assert not (base / "other").exists()


def test_bad_rows_of_pairs_are_counted(drift: Drift, base: Path) -> None:
    """One that breaks the format twice counts once, also where the ids come from the cache."""
    edit_rows(base / "pairs/pairs.train.jsonl", 2, lambda row: row.update(chosen=3, rejected=4))
    edit_rows(base / "pairs/pairs.train.jsonl", 5, lambda row: "[]")
    words = ("train", base / "config.yaml", "--model", base / "model", "--pairs", base / "pairs", "--out", base / "out")
    for _ in range(2):
        code, _, err = drift(*words, "--on-bad-row", "skip")
        assert code == 0, err
        summary = json.loads((base / "out/manifest.json").read_text())["stages"]["train"]["summary"]
        assert summary["pairs"] == 6
        assert summary["drops"] == {"bad row": 2, "not encodable": 0, "completion cut away": 0}
        (base / "out/manifest.json").unlink()


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
        ("sampling.batch_size=10", "sampling.batch_size (10) cannot be split over 4 devices"),
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


@pytest.mark.parametrize(
    ("name", "remedy"),
    [("demo_model", "`python scripts/get_demo_model.py`"), ("tiny_model", "`python scripts/make_tiny_model.py`")],
)
def test_a_model_that_a_checkout_makes_itself_is_named_with_its_command(
    drift: Drift, base: Path, name: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base)
    for path in (f".cache/{name}", base / ".cache" / name):
        assert remedy in run_refused(drift, base, "--set", f"model.path={path}")
        assert remedy in " ".join(
            drift("plan", "config.yaml", "--devices", 1, "--set", f"model.path={path}")[2].split()
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
    code, _, err = drift("export", base / "pairs", "--model", base / "model", "--out", base / "third")
    assert code == 2 and "holds no whole checkpoint" in err.replace("\n", " ")
    for near in ("out", "out/hf", "out/checkpoints/1", "."):
        code, _, err = drift("export", base / near, "--model", base / "model", "--out", base / "third")
        assert code == 2 and f"Give {base / 'out/checkpoints'}." in err.replace("\n", ""), near
    assert not (base / "third").exists()


def test_an_export_that_would_replace_other_files_restores_nothing(
    drift: Drift, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (base / "checkpoints" / "1").mkdir(parents=True)
    monkeypatch.setattr("drift_jax.stages.export.Checkpointer", lambda *_: pytest.fail("it was opened"))
    code, _, err = drift("export", base / "checkpoints", "--model", base / "model", "--out", base / "pairs")
    assert code == 2 and "pairs is there and holds no model: all of it would be replaced" in err.replace("\n", " ")


def test_stages_alone_stay_out_of_the_folder_of_a_run(drift: Drift, base: Path) -> None:
    """It goes on from what is there, such as checkpoints; a folder beside its stages is nobody's."""
    entry = {"config": {}, "inputs": {}, "started": "now", "finished": None, "summary": {}}
    manifest = {"format": 1, "stages": {"seed/train": entry, "iter_1/sample": entry}, "hashes": {}}
    run = base / "run"
    (run / "iter_1").mkdir(parents=True)
    (run / "manifest.json").write_text(json.dumps(manifest))
    config, model = base / "config.yaml", ("--model", base / "model")
    train = ("train", config, *model, "--pairs", base / "pairs", "--out")
    sample = ("sample", config, *model, "--input", base / "dsat.jsonl", "--out")
    before = sorted(run.rglob("*"))
    for words in (train, sample):
        for out, said in (
            (run, "is the folder of a `drift run`"),
            (run / "iter_1", "is a stage of the `drift run` in"),
        ):
            code, _, err = drift(*words, out)
            assert code == 2 and said in " ".join(err.split()) and "Give --out a directory of its own" in err, err
    assert sorted(run.rglob("*")) == before
    code, _, err = drift(*train, run / "iter_1_again")
    assert code == 0, err


@pytest.mark.parametrize(
    ("given", "why", "way"),
    [
        ("pairs/pairs.train.jsonl", "that is a file", True),
        ("mined", "it holds none", True),
        (".", "it holds none", False),
        ("nowhere", "there is none", False),
    ],
)
def test_pairs_are_a_directory(
    drift: Drift, base: Path, monkeypatch: pytest.MonkeyPatch, given: str, why: str, way: bool
) -> None:
    """What is none is said with the way to one, which works."""
    monkeypatch.chdir(base)
    (base / "mined").mkdir()
    write_pairs(base / "mined" / "seed.train.jsonl", 8)
    words = ("train", "config.yaml", "--model", "model", "--pairs")
    code, _, err = drift(*words, given, "--out", "out")
    said = " ".join(err.split())
    assert (
        code == 2 and f"--pairs {given}: a directory with pairs.train.jsonl" in said and f"needed, and {why}." in said
    )
    command = f"drift data convert {given} --to drift --out DIR"
    assert (command in said) == way and not (base / "out").exists()
    if way:
        assert drift(*command.split()[1:])[0] == 0
        assert drift(*words, "DIR", "--out", "out")[0] == 0


def test_mine_takes_the_words_of_other_commands_for_bad_rows(drift: Drift, base: Path) -> None:
    """And stop, its own, as before."""
    words = ("mine", base / "dsat.jsonl", "--format", "messages", "--out", base / "out")
    ends = [drift(*words, *more) for more in ((), ("--on-bad-row", "error"), ("--on-bad-row", "stop"))]
    assert ends[0][0] == 2 and "dsat.jsonl:1" in ends[0][2] and ends == [ends[0]] * 3
    for command in ("mine", "run"):
        assert "error (default) stops" in " ".join(drift(command, "--help")[1].replace("│", " ").split())


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
    assert summary["pairs"] == 7 and summary["drops"]["completion cut away"] == 1
    assert sum(summary["drops"].values()) == 1
    assert len(summary["warnings"]) == 1


def test_paths_in_messages_keep_their_colons(drift: Drift, base: Path) -> None:
    assert "/:train:.yaml" in drift("run", base / ":train:.yaml")[2].replace("\n", "")


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
