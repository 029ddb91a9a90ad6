"""alignment-handbook files: what every key becomes, and how that reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from drift_jax.config import RunConfig, build_config, merge_configs
from drift_jax.errors import ConfigError
from drift_jax.handbook import DatasetMixture, DatasetPart, is_handbook_file, translate_handbook, translation_table
from drift_jax.handbook.keys import ALIASES
from tests.handbook_files import FIXTURES, ours, translate

REPO = Path(__file__).resolve().parent.parent
PUBLISHED = sorted((REPO / "configs" / "handbook").glob("*.yaml"))

# --- the six published configs ----------------------------------------------------------------------------

# recipe.md, "Training [C]"; the same for 7B and 14B. Devices: 3, so that none of the numbers comes from elsewhere.
DEVICES = 3
VALUES: dict[str, Any] = {
    "preset": "paper",
    "train.beta": 0.1,
    "train.rpo_alpha": 0.001,
    "train.label_smoothing": 0.0,
    "train.optimizer": "rmsprop",
    "train.rmsprop_decay": 0.99,
    "train.rmsprop_epsilon": 1e-8,
    "train.weight_decay": 0.0,
    "train.learning_rate": 5e-7,
    "train.schedule": "linear",
    "train.warmup_ratio": 0.1,
    "train.warmup_steps": None,
    "train.max_grad_norm": 1.0,
    "train.max_steps": None,
    "train.group_size": 4,
    "train.batch_size": 4 * DEVICES,
    "train.accumulation_steps": 1,
    "train.nll_reduction": "group_token_mean",
    "train.nll_tokens": "all",
    "train.master_dtype": "float32",
    "train.seed": 42,
    "model.compute_dtype": "bfloat16",
    "model.remat": "layer",
    "data.max_length": 2048,
    "data.max_prompt_length": 1024,
    "data.template": "handbook",
    "data.eos": "append_if_missing",
    "data.truncation": "trl<=0.11",
    "recipe.reference": "previous",
    "sampling.style": "paper",
}


def lookup(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_there_are_six() -> None:
    assert [path.stem for path in PUBLISHED] == [
        f"qwen2.5-{size}-{stage}" for size in ("14b", "7b") for stage in ("iter1", "iter2", "seed")
    ]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
@pytest.mark.parametrize("key", VALUES)
def test_published_value(path: Path, key: str) -> None:
    assert lookup(translate_handbook(path, DEVICES).build(), key) == VALUES[key]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_epochs_and_models(path: Path) -> None:
    config = translate_handbook(path, DEVICES).build()
    _, size, stage = path.stem.split("-")
    epochs = 3 if stage == "seed" else 1
    assert (config.train.epochs, config.recipe.seed_epochs) == (epochs, epochs)
    start = {
        "seed": f"Qwen/Qwen2.5-{size.upper()}-Instruct",
        "iter1": f"runs/handbook/qwen2.5-{size}/seed/hf",
        "iter2": f"runs/handbook/qwen2.5-{size}/iter_1/hf",
    }
    assert config.model.path == start[stage]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_file_names_pairs_for_both_splits(path: Path) -> None:
    mixture = translate_handbook(path, DEVICES).mixture
    assert [part.share for part in mixture.train] == [1.0]
    assert "train" in mixture.train[0].split and "test" in mixture.test[0].split
    assert mixture.seed == 42


def test_each_stage_starts_where_the_one_before_ends() -> None:
    for size in ("7b", "14b"):
        seed, first, second = (
            translate_handbook(REPO / f"configs/handbook/qwen2.5-{size}-{stage}.yaml", 1).build()
            for stage in ("seed", "iter1", "iter2")
        )
        assert first.model.path == f"{seed.run_dir}/hf" and second.model.path == f"{first.run_dir}/hf"


# --- whole files ------------------------------------------------------------------------------------------


def test_an_old_recipe() -> None:
    translation = translate_handbook(FIXTURES / "old.yaml", devices=4)
    config = translation.build()
    train = config.train
    assert config.preset == "paper" and config.model.revision == "main"
    assert (train.batch_size, train.accumulation_steps, train.group_size, train.eval_batch_size) == (64, 2, 8, 16)
    assert (train.beta, train.learning_rate, train.schedule, train.seed) == (0.01, 5e-7, "cosine", 7)
    assert (train.epochs, train.rpo_alpha, train.eval_every) == (1, 0.0, 100)
    assert train.optimizer == "rmsprop"  # what that handbook took where the file is silent
    assert (config.data.max_length, config.data.max_prompt_length) == (1024, 512)
    assert config.data.truncation == "trl<=0.11 keep_start"
    assert (config.checkpoint.every_steps, config.checkpoint.keep) == (100, 3)
    assert (config.tracking.log_every, config.tracking.trackers) == (10, ("tensorboard", "wandb"))
    assert translation.mixture == DatasetMixture(
        train=(
            DatasetPart("org/one", "train_prefs", "default", share=1.0),
            DatasetPart("org/two", "train_prefs", "big", share=0.25),
        ),
        test=(DatasetPart("org/one", "test_prefs", "default"), DatasetPart("org/two", "test_prefs", "big")),
    )


def test_a_new_recipe() -> None:
    translation = translate_handbook(FIXTURES / "new.yaml", devices=4)
    config = translation.build()
    assert (config.preset, config.data.template, config.data.truncation) == ("paper", "reply_text", "trl0.12")
    assert (config.data.eos, config.train.nll_tokens) == ("append", "nonzero")
    assert (config.data.max_length, config.data.max_prompt_length) == (1024, 256)
    assert (config.train.optimizer, config.train.warmup_steps, config.train.epochs) == ("adamw", 20, 2)
    assert (config.model.compute_dtype, config.checkpoint.every_steps) == ("bfloat16", "end")
    assert translation.mixture == DatasetMixture(
        train=(
            DatasetPart("org/one", "train_prefs", "default", ("chosen", "rejected"), 0.5),
            DatasetPart("org/two", "train"),
        ),
        seed=1,
        shuffle_parts=True,
        test_size=2000,
    )


def test_a_list_of_losses_is_trl_1(tmp_path: Path) -> None:
    translation = translate(
        tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.005], max_prompt_length=9, label_smoothing=0.1
    )
    config = translation.build()
    assert (config.preset, config.data.truncation, config.train.rpo_alpha) == ("trl1", "keep_start", 0.005)
    assert (config.data.max_length, config.model.compute_dtype, config.tracking.log_every) == (1024, "bfloat16", 10)
    assert config.train.label_smoothing == 0.0 and "does not read it" in ours(translation)["label_smoothing"]
    assert "one cut" in ours(translation)["max_prompt_length"]


@pytest.mark.parametrize("name", ["old.yaml", "new.yaml"])
def test_every_key_of_a_file_is_in_one_row(name: str) -> None:
    raw = yaml.safe_load((FIXTURES / name).read_text(encoding="utf-8"))
    rows = translate_handbook(FIXTURES / name, 1).rows
    assert [row.key for row in rows if not row.default] == list(raw)
    defaults = [row.key for row in rows if row.default]
    assert len(set(defaults)) == len(defaults) and not set(defaults) & {ALIASES.get(key, key) for key in raw}
    assert all(row.ours for row in rows)


@pytest.mark.parametrize("name", ["old.yaml", "new.yaml"])
def test_every_setting_is_in_one_row(name: str) -> None:
    """What the config says beyond the preset stands in the table, with its value."""
    translation = translate_handbook(FIXTURES / name, 2)
    text = "\n".join(row.ours for row in translation.rows)
    for section, values in translation.config.items():
        for leaf in values if isinstance(values, dict) else [""]:
            assert text.count(f"{section}.{leaf} = " if leaf else f"{section} = ") == 1, (section, leaf)


def test_the_table_prints_keys_values_and_reasons(tmp_path: Path) -> None:
    console = Console(width=160, record=True)
    rows = translate(tmp_path, output_dir="runs/[red]x", trust_remote_code=True, rpo_alpha=0.001).rows
    console.print(translation_table(rows))
    text = console.export_text()
    assert "runs/[red]x" in text
    assert "code of a model's repository is never executed here" in text
    assert "train.rpo_alpha = 0.001" in text
    assert "5e-05 (default)" in text and "train.learning_rate = 5e-05" in text


def test_a_narrow_terminal_crops_no_key_and_no_value(tmp_path: Path) -> None:
    console = Console(width=80, record=True)
    rows = translate(tmp_path, output_dir="runs/" + 40 * "x" + "end", per_device_train_batch_size=1).rows
    console.print(translation_table(rows))
    lines = [line for line in console.export_text().splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line.split("│")] for line in lines]
    columns = ["".join(part) for part in zip(*cells, strict=True)]
    assert "gradient_accumulation_steps" in columns[1] and "…" not in "".join(columns)
    assert f"runs/{40 * 'x'}end" in columns[2].replace('"', "")


def test_pairs_from_elsewhere_are_said_to_be_so(tmp_path: Path) -> None:
    translation = translate(tmp_path, dataset_mixer={"org/x": 1.0}, dataset_splits=["train"])
    changed = translation.without_pairs("CONFIG")
    assert changed.mixture == DatasetMixture() and changed.config == translation.config
    for key in ("dataset_mixer", "dataset_splits"):
        assert ours(changed)[key] == "does not apply: pairs are not read from this file but from CONFIG"
    assert ours(changed)["optim"] == ours(translation)["optim"]


@pytest.mark.parametrize("loss", ["sigmoid", ["sigmoid"]], ids=str)
@pytest.mark.parametrize("keys", [{}, {"warmup_ratio": 0.2}, {"warmup_steps": 0}, {"warmup_steps": 0.5}], ids=str)
def test_nothing_of_a_config_below_survives_where_the_file_is_silent(
    tmp_path: Path, keys: dict[str, Any], loss: Any
) -> None:
    below = {
        "model": {"path": "other", "revision": "abc"},
        "train": {"warmup_steps": 7, "max_steps": 3, "eval_every": 9, "label_smoothing": 0.2},
        "checkpoint": {"every_steps": 9},
    }
    translation = translate(tmp_path, loss_type=loss, **keys)
    merged = build_config(merge_configs(below, translation.config))
    assert merged == translation.build()
    assert (merged.model.revision, merged.train.warmup_steps, merged.train.label_smoothing) == (None, None, 0.0)


def test_a_number_of_warm_up_updates_is_kept(tmp_path: Path) -> None:
    for keys in ({"warmup_steps": 5, "warmup_ratio": 0.1}, {"warmup_ratio": 0.1, "warmup_steps": 5}):
        path = tmp_path / "order.yaml"
        path.write_text(yaml.safe_dump({"model_name_or_path": "m"} | keys, sort_keys=False), encoding="utf-8")
        assert translate_handbook(path, 1).build().train.warmup_steps == 5


def test_the_default_learning_rate_is_that_of_the_stack(tmp_path: Path) -> None:
    rates = [
        translate(tmp_path, **keys).build().train.learning_rate
        for keys in ({}, {"dataset_name": "org/x"}, {"loss_type": ["sigmoid"]})
    ]
    assert rates == [5e-5, 1e-6, 1e-6]


def test_overrides_come_after_the_translation() -> None:
    translation = translate_handbook(PUBLISHED[0], 8)
    assert translation.build(["train.beta=0.3"]).train.beta == 0.3
    assert translation.build().train.beta == 0.1
    other = translation.build(["data.truncation=trl0.12"])
    assert (other.data.eos, other.train.nll_tokens) == ("append", "nonzero")
    assert translation.build(["preset=drift"]).data.template == "generation_prompt"
    assert translation.build(["preset=drift"]).data.truncation == "keep_prompt_end"
    with pytest.raises(ConfigError, match="bta"):
        translation.build(["train.bta=1"])


def test_what_is_a_handbook_file(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    assert is_handbook_file(PUBLISHED[0])
    assert not is_handbook_file(REPO / "configs" / "qwen2.5-7b.yaml")
    path.write_text("model_name_or_path: x\ntrain: {beta: 1}\n", encoding="utf-8")
    assert not is_handbook_file(path)
    path.write_text("beta: 0.1\n", encoding="utf-8")  # the model's name is missing; translating says so
    assert is_handbook_file(path)
    path.write_text("colour: red\n", encoding="utf-8")
    assert not is_handbook_file(path)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text", "", "a: [1", "42"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        translate_handbook(path, 1)
    with pytest.raises(ConfigError, match=r"x\.yaml"):
        is_handbook_file(path)


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        translate_handbook(tmp_path / "none.yaml", 1)


# --- single keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, {"model.compute_dtype": "float32", "model.remat": "none", "train.learning_rate": 5e-5}),
        ({}, {"train.epochs": 3, "train.warmup_ratio": 0.0, "data.max_length": 512, "data.max_prompt_length": 128}),
        ({}, {"train.batch_size": 16, "train.eval_batch_size": 16, "train.group_size": 8, "train.rpo_alpha": 0}),
        ({}, {"checkpoint.every_steps": 500, "checkpoint.keep": 2, "tracking.log_every": 500, "tracking.trackers": ()}),
        ({}, {"run_dir": "runs/recipe", "train.eval_every": None, "train.max_steps": None, "train.seed": 42}),
        ({"bf16": False, "gradient_checkpointing": False}, {"model.compute_dtype": "float32", "model.remat": "none"}),
        ({"bf16": True, "activation_checkpointing": True}, {"model.compute_dtype": "bfloat16", "model.remat": "layer"}),
        ({"bf16": None, "learning_rate": None}, {"model.compute_dtype": "float32", "train.learning_rate": 5e-5}),
        (
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.3},
            {"train.schedule": "constant", "train.warmup_ratio": 0},
        ),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, {"train.warmup_ratio": 0, "train.warmup_steps": None}),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.3},
            {"train.schedule": "constant", "train.warmup_ratio": 0.3},
        ),
        ({"lr_scheduler_type": "cosine"}, {"train.schedule": "cosine"}),
        ({"warmup_steps": 5, "warmup_ratio": 0.3}, {"train.warmup_steps": 5}),
        ({"warmup_steps": 5.0}, {"train.warmup_steps": 5, "train.warmup_ratio": 0.0}),
        ({"warmup_steps": 0, "warmup_ratio": 0.3}, {"train.warmup_steps": None, "train.warmup_ratio": 0.3}),
        ({"warmup_steps": 0}, {"train.warmup_steps": None, "train.warmup_ratio": 0.0}),
        ({"warmup_steps": 0.05, "warmup_ratio": 0.3}, {"train.warmup_steps": None, "train.warmup_ratio": 0.05}),
        ({"max_steps": 20}, {"train.max_steps": 20}),
        ({"max_steps": 0}, {"train.max_steps": None}),
        ({"optim": "adamw_torch"}, {"train.optimizer": "adamw"}),
        ({"optim": "paged_adamw_32bit"}, {"train.optimizer": "adamw"}),
        ({"rpo_alpha": 0.5}, {"train.rpo_alpha": 0.5, "preset": "paper"}),
        ({"loss_type": ["sigmoid", "sft"]}, {"train.rpo_alpha": 1.0, "preset": "trl1"}),
        ({"loss_type": ["sigmoid"]}, {"train.rpo_alpha": 0.0, "preset": "trl1", "train.optimizer": "adamw"}),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, {"train.label_smoothing": 0.1, "preset": "paper"}),
        ({"truncation_mode": "keep_end"}, {"data.truncation": "trl<=0.11"}),
        ({"eval_strategy": "steps", "logging_steps": 7}, {"train.eval_every": 7}),
        ({"eval_strategy": "steps", "logging_steps": 7, "eval_steps": 3}, {"train.eval_every": 3}),
        ({"eval_strategy": "epoch", "eval_steps": 3}, {"train.eval_every": "epoch"}),
        ({"eval_strategy": False}, {"train.eval_every": None}),  # a bare `no`
        ({"evaluation_strategy": "epoch"}, {"train.eval_every": "epoch"}),
        ({"save_strategy": False, "save_steps": 9}, {"checkpoint.every_steps": "end"}),
        ({"save_strategy": "epoch"}, {"checkpoint.every_steps": "epoch"}),
        ({"save_steps": 9, "save_total_limit": 5}, {"checkpoint.every_steps": 9, "checkpoint.keep": 5}),
        ({"save_total_limit": 0}, {"checkpoint.keep": 2}),
        ({"report_to": "tensorboard"}, {"tracking.trackers": ("tensorboard",)}),
        ({"report_to": ["none"]}, {"tracking.trackers": ()}),
        ({"report_to": [], "wandb_project": "p"}, {"tracking.trackers": (), "tracking.project": "p"}),
        ({"seed": 3, "data_seed": 9}, {"train.seed": 9}),
        ({"seed": 3, "data_seed": None}, {"train.seed": 3}),
        ({"weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}, {"train.adam_beta1": 0.8}),
        ({"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5}, {"train.batch_size": 30}),
        ({"tokenizer_name_or_path": "org/model"}, {"model.path": "org/model"}),
    ],
)
def test_key(tmp_path: Path, keys: dict[str, Any], expected: dict[str, Any]) -> None:
    config = translate(tmp_path, devices=2, **keys).build()
    assert {key: lookup(config, key) for key in expected} == expected


def test_all_trackers_are_the_installed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else object())
    assert translate(tmp_path, report_to="all").build().tracking.trackers == ("tensorboard",)


def test_a_default_row_is_marked_and_a_null_row_is_not(tmp_path: Path) -> None:
    rows = {row.key: row for row in translate(tmp_path, beta=None).rows}
    assert not rows["beta"].default and rows["beta"].ours == "train.beta = 0.1"
    assert rows["learning_rate"].default and rows["optim"].default


def test_a_test_split_is_not_named_where_nothing_is_evaluated(tmp_path: Path) -> None:
    assert translate(tmp_path, dataset_name="org/x").mixture.test == ()
    mixture = translate(tmp_path, dataset_name="org/x", dataset_test_split="dev", eval_strategy="epoch").mixture
    assert mixture == DatasetMixture((DatasetPart("org/x", "train"),), (DatasetPart("org/x", "dev"),), seed=None)


def test_the_seed_of_a_newer_mixture_is_0(tmp_path: Path) -> None:
    assert translate(tmp_path, dataset_mixture={"datasets": [{"id": "x"}]}).mixture == DatasetMixture(
        (DatasetPart("x", "train"),), seed=0, shuffle_parts=True
    )


def test_a_file_may_name_no_pairs(tmp_path: Path) -> None:
    translation = translate(tmp_path, dataset_splits=["train"])
    assert translation.mixture == DatasetMixture()
    assert ours(translation)["dataset_splits"] == "does not apply: read only with dataset_mixer"
