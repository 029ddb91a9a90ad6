"""The configuration: a frozen set of keys, strict values, and proof that every key is read."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import drift_jax
from drift_jax import config as config_module
from drift_jax.config import (
    RunConfig,
    build_config,
    check_config,
    config_keys,
    config_to_yaml,
    load_config,
)
from drift_jax.errors import ConfigError
from drift_jax.path_keys import PATH_KEYS
from drift_jax.presets import PRESETS

REPO = Path(__file__).resolve().parent.parent
PACKAGE = Path(drift_jax.__file__).parent

# The contract with users. A change here needs a line in CHANGELOG.md, and a reason.
AXES = ("data", "fsdp", "tensor", "sequence")
KEYS = """
run_dir
model.path model.revision model.compute_dtype model.remat model.scan_layers model.attention model.pad_embedding
preset
data.dsat data.sat data.seed_train data.seed_test data.test_rows data.max_rows data.max_length data.max_prompt_length
data.template data.eos data.truncation data.thinking data.on_bad_row
recipe.method recipe.ranker recipe.iterations recipe.reference recipe.seed_epochs recipe.showcase_prompts
sampling.engine sampling.style sampling.temperature sampling.top_p sampling.top_k sampling.n
sampling.chooser sampling.longest_within sampling.on_cut sampling.max_similarity sampling.max_repetition
sampling.other_speakers sampling.same_language
sampling.max_new_tokens sampling.max_input_length sampling.batch_size sampling.tensor_parallel sampling.per_host
sampling.compute_dtype sampling.seed
judge.base_url judge.model judge.api_key_env judge.temperature judge.max_tokens judge.timeout_s judge.concurrency
judge.price_prompt judge.price_completion
vllm.base_urls vllm.api_key_env vllm.served_name vllm.refresh vllm.python vllm.device vllm.port vllm.max_model_len
vllm.tensor_parallel vllm.gpu_memory_utilization vllm.args vllm.env vllm.start_timeout_s vllm.request_timeout_s
vllm.concurrency
train.beta train.label_smoothing train.rpo_alpha train.nll_reduction train.nll_tokens train.group_size
train.epochs train.max_steps train.batch_size
train.accumulation_steps train.tokens_per_device train.eval_batch_size train.optimizer train.learning_rate
train.schedule
train.warmup_ratio train.warmup_steps train.max_grad_norm train.on_nonfinite train.weight_decay
train.adam_beta1 train.adam_beta2 train.adam_epsilon
train.rmsprop_decay train.rmsprop_epsilon train.master_dtype train.gradient_dtype train.moment_dtype
train.eval_every train.seed train.reference_cache
mesh.data mesh.fsdp mesh.tensor mesh.sequence mesh.strategy mesh.rules
checkpoint.every_steps checkpoint.every_minutes checkpoint.keep
export.dtype export.max_shard_gib
tracking.log_every tracking.trackers tracking.project
theory.every theory.pairs theory.tau
""".split()  # noqa: SIM905 - a list of 90 lines would hide the sections

MINIMAL: dict[str, Any] = {"run_dir": "runs/x", "model": {"path": "somewhere"}}


def build(**sections: Any) -> RunConfig:
    return build_config(MINIMAL | sections)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_set_of_keys_is_frozen() -> None:
    assert config_keys() == KEYS


# Training and sampling as the authors' configs and script have them; what they leave open (devices) is not here.
PUBLISHED = {
    "data.test_rows": 100,
    "data.max_length": 2048,
    "data.max_prompt_length": 1024,
    "recipe.iterations": 2,
    "recipe.reference": "previous",
    "recipe.seed_epochs": 3,
    "sampling.temperature": 0.7,
    "sampling.top_p": 0.9,
    "sampling.max_new_tokens": 512,
    "sampling.max_input_length": 2048,
    "train.beta": 0.1,
    "train.rpo_alpha": 0.001,
    "train.label_smoothing": 0.0,
    "train.optimizer": "rmsprop",
    "train.learning_rate": 5e-7,
    "train.schedule": "linear",
    "train.warmup_ratio": 0.1,
    "train.max_grad_norm": 1.0,
    "train.epochs": 1,
    "train.master_dtype": "float32",
    "train.seed": 42,
    "model.compute_dtype": "bfloat16",
}


def values_of(config: RunConfig) -> dict[str, Any]:
    values = dataclasses.asdict(config)
    return {key: values[section][leaf] for key in PUBLISHED for section, leaf in [key.split(".")]}


def test_the_defaults_are_those_of_the_published_configs() -> None:
    assert values_of(build()) == PUBLISHED
    assert (build().sampling.batch_size, build().train.batch_size) == (16, 32)  # 4 pairs on each of 8 devices


@pytest.mark.parametrize("name", ["qwen2.5-7b", "qwen2.5-14b"])
def test_the_published_recipes_are_shipped(name: str) -> None:
    """Those of slices are compared with these below."""
    assert values_of(load_config(REPO / "configs" / f"{name}.yaml")) == PUBLISHED


@pytest.mark.parametrize("key", PATH_KEYS)
def test_a_path_may_begin_at_home(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind `--set data.dsat=` no shell spells it out, and in a file none ever does."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(MINIMAL))  # which is YAML
    config = load_config(file, [f"{key}=~/a/b"])
    section, _, leaf = key.rpartition(".")
    assert getattr(getattr(config, section) if section else config, leaf) == str(tmp_path / "a" / "b")


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"bta": 0.1}}, r"train\.bta: unknown key\. Did you mean train\.beta\?"),
        ({"trian": {"beta": 0.1}}, "trian: unknown key"),
        ({"colour": "red"}, "colour: unknown key"),
        ({"model": {"revision": "main"}}, r"model\.path: this key is required"),
        ({"train": 3}, "train: .*found 3"),
        ({"train": {"beta": "0.1"}}, r"train\.beta: .*number, found '0\.1'"),
        ({"train": {"beta": True}}, r"train\.beta: .*number, found True"),
        ({"data": {"max_length": "2048"}}, r"data\.max_length: .*integer, found '2048'"),
        ({"data": {"max_length": 2048.5}}, r"data\.max_length: .*integer, found 2048\.5"),
        ({"train": {"optimizer": "sgd"}}, r"train\.optimizer: .*'rmsprop' or 'adamw', found 'sgd'"),
        ({"tracking": {"trackers": ["mlflow"]}}, r"tracking\.trackers\.0: .*found 'mlflow'"),
        ({"train": {"learning_rate": float("inf")}}, r"train\.learning_rate: .*finite number"),
        ({"train": {"adam_beta2": 1.0}}, r"train\.adam_beta2: .*less than 1, found 1\.0"),
        ({"data": {"truncation": ["a"]}}, r"data\.truncation: .*found \['a'\]"),
        ({"preset": ["a"]}, r"preset: .*found \['a'\]"),
        ({"run_dir": ""}, r"run_dir: .*at least 1 character"),
        ({"train": {"beta": 0}}, r"train\.beta: .*greater than 0, found 0"),
        ({"train": {"label_smoothing": 0.5}}, r"train\.label_smoothing: .*less than 0\.5, found 0\.5"),
        ({"sampling": {"top_p": 1.5}}, r"sampling\.top_p: .*less than or equal to 1, found 1\.5"),
    ],
)
def test_a_wrong_key_or_value_is_named(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**sections)


@pytest.mark.parametrize(
    ("section", "key", "value", "line"),
    [
        ("train", "eval_every", "foo", "must be an integer of at least 1 or 'epoch' or null, found 'foo'."),
        ("train", "eval_every", 0, "must be an integer of at least 1 or 'epoch' or null, found 0."),
        ("train", "eval_every", ["a"], "must be an integer of at least 1 or 'epoch' or null, found ['a']."),
        ("checkpoint", "every_steps", 1.5, "must be an integer of at least 1 or 'epoch' or 'end', found 1.5."),
        ("train", "warmup_steps", "x", "Input should be a valid integer, found 'x'."),
        ("train", "warmup_steps", 0, "Input should be greater than or equal to 1, found 0."),
    ],
)
def test_a_key_of_several_types_is_named_in_one_line(section: str, key: str, value: Any, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**{section: {key: value}})
    assert str(caught.value) == f"config:\n  {section}.{key}: {line}"


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        (
            {"data": {"max_prompt_length": 512, "max_length": 512}},
            ("data.max_prompt_length (512)", "data.max_length (512)", "Lower the first or raise the second"),
        ),
        (
            {"train": {"batch_size": 6, "accumulation_steps": 4}},
            ("train.batch_size (6)", "train.accumulation_steps (4)", "multiple", "A batch of 4 would do"),
        ),
        ({"mesh": {"data": -1, "fsdp": -1}}, ("mesh", "'data': -1", "'fsdp': -1", "at most one of them -1")),
        ({"mesh": {"tensor": 0}}, ("mesh", "'tensor': 0", "must be positive")),
        ({"data": {"sat": "~no-such-user/x.jsonl"}}, ("data.sat: '~no-such-user/x.jsonl' begins with the home",)),
        ({"run_dir": "gs://bucket/run"}, ("run_dir: 'gs://bucket/run' is an address", "Mount the bucket")),
        ({"data": {"dsat": "s3://bucket/dsat.jsonl"}}, ("data.dsat: 's3://bucket/dsat.jsonl' is an address",)),
        ({"judge": {"base_url": "host:8000/v1"}}, ("judge.base_url: 'host:8000/v1' is no address of a server",)),
        ({"sampling": {"chooser": "logprob"}}, ("sampling.chooser (logprob)", "sampling.n (1)", "raise sampling.n")),
        ({"sampling": {"chooser": "judge", "n": 2}}, ("sampling.chooser is judge", "judge.base_url and judge.model")),
    ],
)
def test_impossible_values_come_with_both_numbers_and_the_remedy(
    sections: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**sections)
    for part in parts:
        assert part in str(caught.value)


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build(train={"bta": 1, "epochs": 0}, data={"test_rows": "x"})
    for key in ("train.bta", "train.epochs", "data.test_rows"):
        assert key in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        build(data={"max_length": 8, "max_prompt_length": 9}, mesh={"data": 0})
    assert "data.max_length" in str(caught.value) and "mesh" in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "", "a: [1\n", "a: \x00\n"])
def test_a_file_that_is_not_a_config(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load_config(write(tmp_path / "config.yaml", text))


def test_a_missing_file_and_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file at .*Examples are in configs/"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="is not a YAML file"):
        load_config(tmp_path)


# --- YAML and overrides -----------------------------------------------------------------------------------

YAML = "run_dir: runs/x\nmodel: {path: somewhere}\ntrain: {learning_rate: 5e-7}\n"


@pytest.mark.parametrize(("text", "value"), [("5e-7", 5e-7), ("1E-6", 1e-6), ("5.0e-7", 5e-7), ("1", 1.0), (".5", 0.5)])
def test_floats_are_read_as_people_write_them(tmp_path: Path, text: str, value: float) -> None:
    """YAML 1.1 reads 5e-7 as text."""
    path = write(tmp_path / "c.yaml", YAML.replace("5e-7", text))
    assert load_config(path).train.learning_rate == value


@pytest.mark.parametrize("text", ["5e", "e7", "1e-7x"])
def test_text_that_looks_like_a_float_stays_text(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path / "c.yaml", YAML.replace("somewhere", text))).model.path == text


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path / "c.yaml", YAML)
    overrides = [
        "train.learning_rate=1e-6",
        "model.path=org/name",
        "data.seed_train=null",
        "recipe.showcase_prompts=[one, 'two = 2']",
        "mesh.data=2",
        "mesh.data=4",
    ]
    config = load_config(path, overrides)
    assert config.train.learning_rate == 1e-6
    assert config.model.path == "org/name"
    assert config.data.seed_train is None
    assert config.recipe.showcase_prompts == ("one", "two = 2")
    assert config.mesh.data == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.beta", "--set takes KEY=VALUE"),
        ("=3", "--set takes KEY=VALUE"),
        ("train.bta=3", r"train\.bta: unknown key"),
        ("train.beta.x=3", "'beta' is not a section|unknown key|found"),
        ("model.path.x=3", "'path' is not a section"),
        ("train.beta=[", "is not a YAML value"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "c.yaml", YAML), [override])


def test_a_config_survives_being_written(tmp_path: Path) -> None:
    config = build(
        recipe={"showcase_prompts": ["a: b", "é\n'quoted'"]},
        train={"learning_rate": 5e-7, "max_steps": 3},
        tracking={"trackers": ["tensorboard"]},
    )
    text = config_to_yaml(config)
    assert load_config(write(tmp_path / "c.yaml", text)) == config
    for key in KEYS:  # every key is written out, the defaults too
        assert f"{key.split('.')[-1]}:" in text


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        build().train.beta = 0.2  # type: ignore[misc]
    changed = dataclasses.replace(build(), mesh=config_module.MeshConfig(data=0))
    with pytest.raises(ConfigError):
        check_config(changed)


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    config = load_config(path)
    for name in ("dsat", "seed_train", "seed_test"):
        file = getattr(config.data, name)
        if file and file.startswith("data/sample/"):  # others are the user's to make
            assert (REPO / file).is_file(), f"{path.name} names {file}, which is not shipped"
    if config.data.dsat.startswith("data/sample/"):
        assert config.data.test_rows == 16, "fewer, and tasks of held-out rows are trained on (data/README.md)"


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_another_preset_holds_whole_in_every_shipped_config(path: Path, preset: str) -> None:
    """None of them writes a key that a preset decides."""
    config = dataclasses.asdict(load_config(path, [f"preset={preset}"]))
    found = {key: config[section][leaf] for key in PRESETS[preset] for section, leaf in [key.split(".")]}
    assert found == PRESETS[preset]


def test_configs_are_shipped() -> None:
    assert {"quickstart", "debug"} <= {path.stem for path in (REPO / "configs").glob("*.yaml")}


CHIPS = {"v5e-16": 16, "v5p-8": 4, "v6e-16": 16, "8xh100": 8}
OF_SLICES = sorted(path for path in (REPO / "configs").glob("qwen*.yaml") if any(name in path.stem for name in CHIPS))


@pytest.mark.parametrize("path", OF_SLICES, ids=lambda path: path.stem)
def test_a_slice_changes_where_a_recipe_runs_and_not_what_it_does(path: Path) -> None:
    name = next(name for name in CHIPS if path.stem.endswith(name))
    ours, base = (json.loads(json.dumps(dataclasses.asdict(load_config(file)))) for file in (path, base_of(path, name)))
    assert math.prod(ours["mesh"][axis] for axis in AXES) == CHIPS[name]
    for config in (ours, base):
        config.pop("mesh")
        for section, key in (("train", "accumulation_steps"), ("model", "remat")):
            config[section].pop(key)
        for key in ("gradient_dtype", "moment_dtype"):  # named in the table of the README where they are needed
            assert config["train"].pop(key) in ("float32", "bfloat16")
    assert ours == base


def base_of(path: Path, name: str) -> Path:
    return path.with_name(path.stem.removesuffix(f"-{name}") + ".yaml")


# --- every key is read ------------------------------------------------------------------------------------


class KeyReads(ast.NodeVisitor):
    """Finds the keys that one module reads: `<section>.<key>`, where the section is `something.train`, a name
    annotated `TrainConfig`, or a name that such an expression was assigned to."""

    def __init__(self, tree: ast.Module) -> None:
        self.classes = {cls.__name__: name for name, cls in config_module._SECTIONS.items()}
        self.classes["RunConfig"] = ""
        self.names: dict[str, set[str]] = {}  # a variable's name -> the sections it holds in this module
        self.found: set[str] = set()
        for _ in range(2):  # an assignment may stand before the annotation it depends on
            for node in ast.walk(tree):
                self._learn(node)
        self.visit(tree)

    def _learn(self, node: ast.AST) -> None:
        if isinstance(node, ast.arg):
            self._annotate(node.arg, node.annotation)
        elif isinstance(node, ast.AnnAssign):
            self._annotate(ast.unparse(node.target), node.annotation)
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value)

    def _annotate(self, name: str, annotation: ast.expr | None) -> None:
        for part in ast.walk(annotation) if annotation else ():
            if isinstance(part, ast.Name) and part.id in self.classes:
                self.names.setdefault(name, set()).add(self.classes[part.id])

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one_target, one_value in zip(target.elts, value.elts, strict=True):
                self._assign(one_target, one_value)
        elif isinstance(target, ast.Name | ast.Attribute):
            sections = self._sections(value)
            self.names.setdefault(ast.unparse(target).removeprefix("self."), set()).update(sections)

    def _sections(self, node: ast.expr) -> set[str]:
        """The sections that an expression may hold; "" is the whole config."""
        if isinstance(node, ast.Attribute):
            own = {node.attr} if node.attr in config_module._SECTIONS else set()
            return own | self.names.get(node.attr, set())
        return self.names.get(node.id, set()) if isinstance(node, ast.Name) else set()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        for section in self._sections(node.value):
            self.found.add(f"{section}.{node.attr}".removeprefix("."))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        # sharding.py reads the axes of the mesh by name: getattr(config, axis) for axis in AXES.
        by_name = isinstance(node.func, ast.Name) and node.func.id == "getattr"
        if by_name and "mesh" in self._sections(node.args[0]):
            self.found.update(f"mesh.{axis}" for axis in AXES)
        self.generic_visit(node)


def read_keys(source: str) -> set[str]:
    return KeyReads(ast.parse(source)).found & set(KEYS)


def package_sources() -> Iterator[str]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "config.py":
            yield path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("source", "keys"),
    [
        ("def f(config): return config.train.beta", {"train.beta"}),
        ("def f(c: TrainConfig): return c.beta", {"train.beta"}),
        ("def f(c: TrainConfig | None): return c.beta", {"train.beta"}),
        ("def f(config):\n  data, t = config.data, config.train\n  return t.seed", {"train.seed"}),
        ("class A:\n  c: SamplingConfig\n  def f(self): return self.c.seed", {"sampling.seed"}),
        ("class A:\n  def f(self, c: SamplingConfig): self.s = c\n  def g(self): return self.s.n", {"sampling.n"}),
        ("def f(c: RunConfig): return c.run_dir", {"run_dir"}),
        ("def f(c: MeshConfig): return [getattr(c, a) for a in AXES]", {f"mesh.{axis}" for axis in AXES}),
        ("def f(c: SamplingConfig): return c.seed", {"sampling.seed"}),  # and not train.seed
        ("def f(other): return other.seed + other.beta", set()),
        ("x = 'train.beta'", set()),
    ],
)
def test_the_proof_below_can_fail(source: str, keys: set[str]) -> None:
    assert read_keys(source) == keys


def test_every_key_is_read() -> None:
    read = set().union(*(read_keys(source) for source in package_sources()))
    assert set(KEYS) - read == set(), "keys that nothing in drift_jax reads"


def test_every_section_is_listed() -> None:
    """`config_keys` walks `_SECTIONS`; a section that is missing there would hide its keys."""
    hints = typing.get_type_hints(RunConfig)
    sections = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    assert sections == config_module._SECTIONS
