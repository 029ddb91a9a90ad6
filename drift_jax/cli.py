"""The `drift` command: parse, call, print. Exit code 2 and one message for what the user can mend."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer
from rich.console import Console

from drift_jax.config import RunConfig, load_config
from drift_jax.errors import ConfigError, DriftError

if TYPE_CHECKING:
    from drift_jax.handbook import Translation

app = typer.Typer(
    name="drift",
    help="DRIFT: trains a chat model from the replies its users were unhappy with.\n\n"
    "Start with `drift doctor`, then `drift run configs/quickstart.yaml`. Every command takes `--help`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; examples are in configs/.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads this form on every version)
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the config, such as train.beta=0.2. Repeatable."),
]
OnBadRow = Annotated[
    Optional[Literal["error", "skip"]],  # noqa: UP045
    typer.Option(
        "--on-bad-row", help="What to do with rows that break the format: stop (default) or leave out, counted."
    ),
]
ModelDir = Annotated[str, typer.Option("--model", help="Hugging Face model directory or hub id.")]
OutDir = Annotated[Path, typer.Option("--out", help="Directory for the results.")]


def _changes(overrides: list[str] | None, on_bad_row: str | None, **keys: object) -> list[str]:
    """What the command line changes in a config, as `a.b=c`."""
    changes = list(overrides or [])
    if on_bad_row is not None:
        changes.append(_change("data.on_bad_row", on_bad_row))
    return changes + [_change(key, value) for key, value in keys.items() if value is not None]


def _change(key: str, text: object) -> str:
    """`key=text`, quoted: the right side of an override is YAML, which would read `2024` or `a #b` otherwise."""
    return f"{key}={json.dumps(str(text), ensure_ascii=False)}"


def _console(stderr: bool = False) -> Console:
    """Colons in paths and values are no emoji codes."""
    return Console(stderr=stderr, emoji=False)


def _refuse_handbook(config: Path) -> None:
    """Raises `ConfigError` with the ways to use a handbook file where a CONFIG of ours is asked for."""
    from drift_jax.handbook import is_handbook_file

    if is_handbook_file(config):
        raise ConfigError(
            f"{config} is a file of alignment-handbook. `drift run --handbook {config}` and `drift train {config}` "
            f"take it as it is; `drift config translate {config} --out FILE` writes it as a CONFIG."
        )


def _resolve(model: str, config: RunConfig) -> Path:
    """The directory of a model. The config's revision is one of the config's model, and of no other."""
    from drift_jax.models.hf import resolve_model

    return resolve_model(model, config.model.revision if model == config.model.path else None)


@app.command()
def run(
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(metavar="[CONFIG]", help="YAML file; examples are in configs/. Optional with --handbook."),
    ] = None,
    handbook: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--handbook",
            help="alignment-handbook DPO YAML. Its keys win over those of CONFIG; without, its pairs are the seed's.",
        ),
    ] = None,
    overrides: Overrides = None,
    run_dir: Annotated[Optional[Path], typer.Option(help="Where the run lives; replaces run_dir.")] = None,  # noqa: UP045
    on_bad_row: OnBadRow = None,
) -> None:
    """The whole recipe: seed, then sample -> pair -> train -> export for each iteration. Run again to resume."""
    from drift_jax.recipe import run as run_recipe

    changes = _changes(overrides, on_bad_row, run_dir=run_dir)
    if handbook is not None:
        run_recipe(_handbook_run(handbook, config, changes), _console())
    elif config is not None:
        _refuse_handbook(config)
        run_recipe(load_config(config, changes), _console())
    else:
        raise ConfigError("give a CONFIG, such as configs/quickstart.yaml, or --handbook FILE.")


def _handbook_run(path: Path, config: Path | None, changes: list[str]) -> RunConfig:
    """A run by the hyper-parameters of a handbook file; records and pairs come from CONFIG, or pairs from the file."""
    from drift_jax.data.mixer import load_mixture
    from drift_jax.handbook import translate_handbook

    base = _base_of_handbook(config) if config is not None else {}
    translation = translate_handbook(path, _devices_with_pairs(base, changes))
    if config is not None:
        translation = translation.without_pairs(str(config))
        _print_translation(translation, _console())
        return translation.over(base, source=f"{config} with {path}").build(changes)
    resolved = translation.build(changes)
    if resolved.data.seed_train is not None:
        translation = translation.without_pairs(resolved.data.seed_train)
    _print_translation(translation, _console())
    # With records alone there is no seed stage; with neither, loading says that there are no pairs.
    if resolved.data.seed_train is None and (translation.mixture.train or not resolved.data.dsat):
        pairs = load_mixture(translation.mixture, Path(resolved.run_dir) / "data", resolved.data.on_bad_row)
        changes = [_change("data.seed_train", pairs / "pairs.train.jsonl"), *changes]
        if (pairs / "pairs.test.jsonl").exists():
            changes = [_change("data.seed_test", pairs / "pairs.test.jsonl"), *changes]
    if not resolved.data.dsat:
        changes = ["recipe.iterations=0", *changes]
    return translation.build(changes)


def _base_of_handbook(config: Path) -> dict[str, Any]:
    """The plain values of CONFIG, less what presets decide: there the preset of the handbook file holds."""
    from drift_jax.config import read_yaml
    from drift_jax.presets import CHOICES

    _refuse_handbook(config)
    base = read_yaml(config)
    for key in CHOICES:
        section, leaf = key.split(".")
        if isinstance(base.get(section), dict):
            base[section] = {name: value for name, value in base[section].items() if name != leaf}
    return base


def _devices_with_pairs(base: dict[str, Any], changes: list[str]) -> int:
    """Devices that hold pairs of their own; a handbook file's batch is that of one of them, and it sets no mesh."""
    from drift_jax.config import build_config
    from drift_jax.handbook import with_overrides
    from drift_jax.sharding import build_mesh

    # The mesh alone: whether the rest fits together cannot be said before the batch is known.
    values = {"run_dir": "none", "model": {"path": "none"}, "mesh": with_overrides(base, changes).get("mesh", {})}
    shape = build_mesh(build_config(values).mesh).shape
    return shape["data"] * shape["fsdp"]


def _print_translation(translation: Translation, console: Console) -> None:
    from drift_jax.handbook import translation_table

    console.print(translation_table(translation.rows))


@app.command()
def sample(
    config: ConfigFile,
    model: ModelDir,
    input: Annotated[Path, typer.Option("--input", help="JSONL of DSAT records.")],
    out: OutDir,
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
) -> None:
    """Samples chosen responses for DSAT records and writes pairs.train.jsonl and pairs.test.jsonl."""
    from drift_jax.manifest import Manifest
    from drift_jax.stages.identity import sample_identity
    from drift_jax.stages.inputs import load_dsat_split
    from drift_jax.stages.sample import pair_stage, sample_stage

    _refuse_handbook(config)
    resolved = load_config(config, _changes(overrides, on_bad_row))
    console, model_dir, manifest = _console(), _resolve(model, resolved), Manifest(out)
    load_dsat_split(resolved, str(input))  # bad rows are refused before anything is written
    keys, inputs = sample_identity(resolved, manifest, model_dir, input)
    if not manifest.enter("sample", keys, inputs):
        summary = sample_stage(resolved, model_dir, str(input), out, console)
        manifest.finish("sample", summary | pair_stage(resolved, inputs["policy"], str(input), out))
    console.print_json(data=manifest.summary("sample"))


@app.command()
def train(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file, ours or a DPO file of alignment-handbook as it is.")
    ],
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model", help="Hugging Face model directory or hub id; a handbook file names one."),
    ] = None,
    pairs: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--pairs", help="Directory with pairs.train.jsonl and pairs.test.jsonl; or as above."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="Directory for the results; or as above.")] = None,  # noqa: UP045
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Reference model; default: the model that training starts from."),
    ] = None,
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
) -> None:
    """One DPO stage on pairs: checkpoints, metrics and a Hugging Face directory in OUT/hf. Run again to resume."""
    from drift_jax.data.mixer import load_mixture
    from drift_jax.handbook import is_handbook_file, translate_handbook
    from drift_jax.manifest import Manifest
    from drift_jax.records import read_pairs
    from drift_jax.stages.dpo import TrainJob, train_stage
    from drift_jax.stages.export import export_stage
    from drift_jax.stages.identity import export_identity

    changes, console = _changes(overrides, on_bad_row), _console()
    if is_handbook_file(config):
        translation = translate_handbook(config, _devices_with_pairs({}, changes))
        _print_translation(translation.without_pairs(str(pairs)) if pairs else translation, console)
        resolved = translation.build(changes)
        model, out = model or resolved.model.path, out or Path(resolved.run_dir)
        pairs = pairs or load_mixture(translation.mixture, out / "data", resolved.data.on_bad_row)
    elif model is None or pairs is None or out is None:
        given = {"--model": model, "--pairs": pairs, "--out": out}
        missing = ", ".join(option for option, value in given.items() if value is None)
        raise ConfigError(f"{config} is not a handbook file, so {missing} must be given on the command line.")
    else:
        resolved = load_config(config, changes)
    model_dir, manifest = _resolve(model, resolved), Manifest(out)
    reference_dir = _resolve(reference, resolved) if reference else model_dir
    train_pairs, test_pairs = pairs / "pairs.train.jsonl", pairs / "pairs.test.jsonl"
    test = test_pairs if test_pairs.exists() else None
    for path in filter(None, (train_pairs, test)):
        read_pairs(path, resolved.data.on_bad_row)  # bad rows are refused before anything is written
    job = TrainJob(model_dir, reference_dir, train_pairs, test, out, resolved.train.epochs)
    if not manifest.enter("train", *export_identity(resolved, manifest, job)):
        summary = train_stage(resolved, job, console)
        manifest.finish("train", summary | export_stage(resolved, out / "checkpoints", model_dir, out / "hf", console))
    console.print_json(data=manifest.summary("train"))


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help="The checkpoints directory of a stage, such as RUN/iter_2/checkpoints.")
    ],
    model: Annotated[
        str, typer.Option("--model", help="Model the stage started from: config and tokenizer come from it.")
    ],
    out: OutDir,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Dtype of the weights.")
    ] = "bfloat16",
) -> None:
    """Writes the newest checkpoint as a Hugging Face directory that transformers and vLLM load."""
    from drift_jax.config import build_config
    from drift_jax.models.hf import resolve_model
    from drift_jax.stages.export import export_stage

    config = build_config({"run_dir": str(out), "model": {"path": model}, "export": {"dtype": dtype}})
    console = _console()
    summary = export_stage(config, checkpoint, resolve_model(model), out, console)
    console.print_json(data=dataclasses.asdict(config.export) | summary)


@app.command()
def presets() -> None:
    """What the presets drift, paper and trl1 choose, and what every choice does."""
    from drift_jax.presets import presets_table

    _console().print(presets_table())


config_app = typer.Typer(help="Reads and writes configs.", no_args_is_help=True)
app.add_typer(config_app, name="config")


@config_app.command()
def translate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A DPO file of alignment-handbook.")],
    devices: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Devices that hold pairs; the file's batch is per device. Default: those found here."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option("--out", help="Where to write; default: standard output.")] = None,  # noqa: UP045
    overrides: Overrides = None,
) -> None:
    """Writes the config that an alignment-handbook file means; the table of keys goes to standard error."""
    from drift_jax.config import config_to_yaml
    from drift_jax.handbook import translate_handbook
    from drift_jax.records import atomic_writer

    changes = _changes(overrides, None)
    translation = translate_handbook(file, devices or _devices_with_pairs({}, changes))
    _print_translation(translation, _console(stderr=True))
    text = config_to_yaml(translation.build(changes))
    if out is None:
        print(text, end="")
    else:
        with atomic_writer(out) as handle:
            handle.write(text)


@app.command()
def doctor() -> None:
    """Devices, versions, memory, and which extras are missing with the command that adds them."""
    from drift_jax.doctor import run_doctor

    raise typer.Exit(run_doctor(_console()))


def main() -> None:
    """Console entry point."""
    # transformers brings tokenizers and templates here; that torch is missing is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        app()
    except DriftError as error:
        _console(stderr=True).print(f"[bold red]error:[/] {_escape(error)}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None


def _escape(error: DriftError) -> str:
    from rich.markup import escape

    return escape(str(error))
