"""alignment-handbook files: what is refused and how that reads, and that no key of the stacks is unknown."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from drift_jax.errors import ConfigError
from drift_jax.handbook import translate_handbook, translation_table
from drift_jax.handbook.keys import ALIASES, CHOICES, DIRECT, IGNORED, ONLY, STACKS
from drift_jax.handbook.translation import _ALL_RULES, KNOWN_KEYS
from tests.handbook_files import FIXTURES, ours, translate

MIXTURE = {"datasets": [{"id": "x"}]}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learning_rate": "fast"}, 'learning_rate: .*number, found "fast"'),
        ({"learning_rate": 0}, "learning_rate: .*greater than 0, found 0"),
        ({"learning_rate": float("nan")}, "learning_rate: .*found NaN"),
        ({"beta": True}, "beta: .*number, found true"),
        ({"beta": [0.1]}, r"beta: .*found \[0.1\]"),
        ({"bf16": "true"}, 'bf16: must be true or false, found "true"'),
        ({"max_length": 10.5}, "max_length: .*integer"),
        ({"max_length": -1}, "max_length: .*found -1"),
        ({"adam_beta1": 1.0}, "adam_beta1: .*less than 1"),
        ({"label_smoothing": 0.6}, "label_smoothing: .*less than 0.5"),
        ({"optim": "adamw_bnb_8bit"}, 'optim: must be .*"adamw_torch".*found "adamw_bnb_8bit"'),
        ({"optim": "adafactor"}, 'found "adafactor"'),
        ({"optim": ["sgd"]}, "optim: must be"),
        ({"lr_scheduler_type": "polynomial"}, 'must be "linear" or "cosine".*found "polynomial"'),
        ({"lr_scheduler_kwargs": {"min_lr": 0}}, "lr_scheduler_kwargs: must be left out, .*no further parameters"),
        ({"max_grad_norm": 0}, r"max_grad_norm: must be above 0, found 0: .*1\.0e\+9 clips none"),
        ({"max_grad_norm": None}, r"max_grad_norm: must not be null: .*1\.0e\+9"),
        ({"model_name_or_path": None}, "model_name_or_path: must not be null"),
        ({"warmup_ratio": 1.5}, "warmup_ratio: .*less than or equal to 1"),
        ({"warmup_steps": -1}, "warmup_steps: .*greater than or equal to 0"),
        ({"warmup_steps": 2.5}, "warmup_steps: .*integer.*found 2.5"),
        ({"num_train_epochs": 0}, "num_train_epochs: .*greater than 0"),
        ({"max_steps": 1.5}, "max_steps: .*integer"),
        ({"loss_type": "ipo"}, 'loss_type: must be "sigmoid" or .*found "ipo"'),
        ({"loss_type": ["sft"]}, r"loss_type: .*found \[\"sft\"\]"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [0.5, 1.0]}, "loss_weights: .*the first 1.0"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "loss_weights: must be one weight for each"),
        ({"loss_type": ["sigmoid", "sft"], "rpo_alpha": 1.0}, "rpo_alpha: .*keep one"),
        ({"loss_type": [], "loss_weights": []}, "loss_weights: "),
        ({"rpo_alpha": -1}, "rpo_alpha: .*greater than or equal to 0"),
        ({"truncation_mode": "middle"}, 'truncation_mode: must be "keep_end" or "keep_start"'),
        ({"loss_type": ["sigmoid"], "truncation_mode": "keep_end"}, 'must be "keep_start", found "keep_end"'),
        ({"loss_type": ["sigmoid"], "max_length": None}, "max_length: must not be null"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size: .*greater than or equal to 1"),
        ({"gradient_accumulation_steps": "2"}, 'gradient_accumulation_steps: .*integer, found "2"'),
        ({"per_device_eval_batch_size": 1.5}, "per_device_eval_batch_size: .*integer"),
        ({"save_steps": 0.5}, "save_steps: must be a number of updates, found 0.5"),
        ({"eval_steps": 0.1, "eval_strategy": "steps"}, "eval_steps: must be a number of updates, found 0.1"),
        ({"logging_steps": 0}, "logging_steps: .*greater than or equal to 1"),
        ({"eval_strategy": "best"}, 'must be "no" or "steps" or "epoch", found "best"'),
        ({"eval_strategy": True}, "eval_strategy: must be"),
        ({"do_eval": "yes"}, "do_eval: .*boolean"),
        ({"save_total_limit": 1.5}, "save_total_limit: .*integer"),
        ({"report_to": ["wandb", "mlflow"]}, "report_to: must be none, all, or a list of tensorboard and wandb"),
        ({"report_to": ["none", "wandb"]}, "report_to: must be none"),
        ({"report_to": 3}, "report_to: .*list"),
        ({"seed": "42"}, "seed: .*integer"),
        ({"data_seed": 1.5}, "data_seed: .*integer"),
        ({"tokenizer_name_or_path": "org/other"}, 'must be that of the model, "org/model", found "org/other"'),
        ({"eval_strategy": "no", "evaluation_strategy": "no"}, "evaluation_strategy, eval_strategy: two names"),
        ({"dataset_mixer": {"a": 1.5}}, r"dataset_mixer: a: .*less than or equal to 1, found 1\.5"),
        ({"dataset_mixer": {}}, "dataset_mixer: "),
        ({"dataset_mixer": ["a"]}, "dataset_mixer: .*dict"),
        ({"dataset_splits": ["validation"]}, "dataset_splits: .*train or test"),
        ({"dataset_splits": ["test"]}, "dataset_splits: .*one with train"),
        ({"dataset_mixer": {"a": 1.0}, "dataset_configs": ["x", "y"]}, "dataset_configs: .*each of the 1 datasets"),
        ({"dataset_mixer": {"a": 1.0}, "dataset_mixture": MIXTURE}, "dataset_mixer, dataset_mixture: each names"),
        ({"dataset_mixture": {"datasets": []}}, "dataset_mixture: datasets: .*at least 1"),
        ({"dataset_mixture": {"datasets": [{"id": "x", "wieght": 1}]}}, r"dataset_mixture: datasets\[0\]\.wieght: "),
        ({"dataset_mixture": {"datasets": [{"config": "x"}]}}, r"dataset_mixture: datasets\[0\]\.id: .*required"),
        ({"dataset_mixture": {"datasets": [{"id": "x", "columns": ["chosen"]}]}}, "columns of x must hold chosen and"),
        ({"dataset_mixture": {"datasets": [{"id": 3}, {"id": 4}]}}, r"datasets\[0\]\.id: .*found 3; .*\[1\]\.id: .*4"),
        ({"dataset_mixture": MIXTURE | {"test_split_size": 0}}, "dataset_mixture: test_split_size: .*found 0"),
        ({"dataset_mixture": MIXTURE | {"test_split_size": 2.5}}, "a number of rows, or a share below 1, found 2.5"),
    ],
)  # fmt: skip
def test_a_value_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate(tmp_path, **keys)


@pytest.mark.parametrize("key", ONLY)
def test_a_restricted_key_takes_its_values_and_no_other(tmp_path: Path, key: str) -> None:
    allowed, reason = ONLY[key]
    for value in (*allowed, None):
        assert ours(translate(tmp_path, **{key: value}))[key] == "as here in any case"
    for value in ("something else", 7, not any(value is True for value in allowed)):
        with pytest.raises(ConfigError) as caught:
            translate(tmp_path, **{key: value})
        assert f"{key}: must be " in str(caught.value) and reason in str(caught.value)


@pytest.mark.parametrize("key", IGNORED)
def test_a_key_that_does_not_apply_says_why(tmp_path: Path, key: str) -> None:
    translation = translate(tmp_path, **{key: "anything"})
    assert ours(translation)[key] == f"does not apply: {IGNORED[key]}"
    assert translation.config == translate(tmp_path).config


def test_all_problems_of_a_file_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        translate_handbook(FIXTURES / "many_problems.yaml", 1)
    first, *problems = str(caught.value).splitlines()
    assert first.endswith("many_problems.yaml cannot be translated, 15 problems:")
    raw = yaml.safe_load((FIXTURES / "many_problems.yaml").read_text(encoding="utf-8"))
    assert [line.split(":")[0].strip() for line in problems] == [key for key in raw if key != "model_name_or_path"]


def test_all_unknown_keys_are_named_with_the_closest_known_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        translate(tmp_path, learning_rte=1e-6, betta=0.1, train=1, zzzzzz=1, **{"max-length": 5})
    message = str(caught.value)
    assert "learning_rte: unknown key. Did you mean learning_rate?" in message
    assert "betta: unknown key. Did you mean beta?" in message
    assert "max-length: unknown key. Did you mean max_length?" in message
    assert "  zzzzzz: unknown key.\n" in message + "\n"
    assert "5 problems" in message


@pytest.mark.parametrize("key", ["3", "2024-01-01", "~"])
def test_keys_that_are_no_text_are_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"model_name_or_path: x\n{key}: 4\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=f"the key '{key}' is not text"):
        translate_handbook(path, 1)


def test_the_model_is_required(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("beta: 0.1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="model_name_or_path: this key is required"):
        translate_handbook(path, 1)


def test_there_is_at_least_one_device(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one device, found 0"):
        translate(tmp_path, devices=0)


# --- the tables -------------------------------------------------------------------------------------------


def test_a_key_is_in_one_table() -> None:
    tables: list[Any] = [ALIASES, IGNORED, ONLY, DIRECT, CHOICES, _ALL_RULES]
    keys = [key for table in tables for key in table]
    assert sorted(keys) == sorted(set(keys)) and set(keys) == KNOWN_KEYS
    for stack in STACKS.values():
        assert {*stack.defaults, *stack.ignored, *stack.not_null} <= KNOWN_KEYS


def test_every_field_of_transformers_is_known() -> None:
    from transformers import TrainingArguments

    assert {field.name for field in dataclasses.fields(TrainingArguments)} <= KNOWN_KEYS


@pytest.mark.parametrize("name", ["DPOConfig", "ModelConfig", "ScriptArguments"])
def test_every_field_of_trl_is_known_and_its_default_accepted(tmp_path: Path, name: str) -> None:
    trl = pytest.importorskip("trl")
    defaults = {}
    for field in dataclasses.fields(getattr(trl, name)):
        factory = field.default_factory
        defaults[field.name] = field.default if factory is dataclasses.MISSING else factory()
    assert set(defaults) <= KNOWN_KEYS
    # Aliases and null are other names of what is there already; a config is read beside the model's name.
    keys = {key: value for key, value in defaults.items() if value is not None and key not in ALIASES}
    translate(tmp_path, **({"loss_type": ["sigmoid"]} | keys)).build()


KEY = st.one_of(st.sampled_from(sorted(KNOWN_KEYS)), st.text(max_size=8), st.integers(), st.none())
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.binary(max_size=4),
    st.sampled_from(["steps", "epoch", "no", "constant", "sigmoid", "sft", "all", "keep_start", "rmsprop", "train"]),
)
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.dictionaries(KEY, VALUE, max_size=6), devices=st.integers(1, 9))
def test_nothing_but_config_errors(tmp_path: Path, keys: dict[Any, Any], devices: int) -> None:
    path = tmp_path / "fuzz.yaml"
    path.write_text(yaml.safe_dump({"model_name_or_path": "org/model"} | keys, sort_keys=False), encoding="utf-8")
    try:
        translation = translate_handbook(path, devices)
        translation_table(translation.rows)
        assert {row.key for row in translation.rows} >= {str(key) for key in keys}
        assert "mesh" not in translation.config  # the batch was translated for a mesh that was settled before
        translation.build()
    except ConfigError:
        pass


def test_a_list_that_holds_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for key in sorted(KNOWN_KEYS - IGNORED.keys()):
        path.write_text(f"model_name_or_path: x\n{key}: &a [*a]\n", encoding="utf-8")
        with pytest.raises(ConfigError, match=key):
            translate_handbook(path, 1)
