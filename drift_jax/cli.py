"""The `drift` command: parse, call, print. Exit code 2 and one message for what the user can mend."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer
from rich.console import Console

from drift_jax.config import RunConfig, load_config
from drift_jax.errors import DriftError

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


def _load(path: Path, overrides: list[str] | None, on_bad_row: str | None = None, **sections: object) -> RunConfig:
    changes = list(overrides or [])
    if on_bad_row is not None:
        changes.append(f"data.on_bad_row={on_bad_row}")
    changes += [f"{key.replace('__', '.')}={value}" for key, value in sections.items() if value is not None]
    return load_config(path, changes)


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    run_dir: Annotated[Optional[Path], typer.Option(help="Where the run lives; replaces run_dir.")] = None,  # noqa: UP045
    on_bad_row: OnBadRow = None,
) -> None:
    """The whole recipe: seed, then sample -> pair -> train -> export for each iteration. Run again to resume."""
    from drift_jax.recipe import run as run_recipe

    run_recipe(_load(config, overrides, on_bad_row, run_dir=run_dir), Console())


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
    from drift_jax.models.hf import resolve_model
    from drift_jax.stages.identity import sample_identity
    from drift_jax.stages.inputs import load_dsat_split
    from drift_jax.stages.sample import pair_stage, sample_stage

    resolved = _load(config, overrides, on_bad_row)
    console, model_dir, manifest = Console(), resolve_model(model), Manifest(out)
    load_dsat_split(resolved, str(input))  # bad rows are refused before anything is written
    keys, inputs = sample_identity(resolved, manifest, model_dir, input)
    if not manifest.enter("sample", keys, inputs):
        summary = sample_stage(resolved, model_dir, str(input), out, console)
        manifest.finish("sample", summary | pair_stage(resolved, inputs["policy"], str(input), out))
    console.print_json(data=manifest.summary("sample"))


@app.command()
def train(
    config: ConfigFile,
    model: ModelDir,
    pairs: Annotated[Path, typer.Option("--pairs", help="Directory with pairs.train.jsonl and pairs.test.jsonl.")],
    out: OutDir,
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Reference model; default: the model that training starts from."),
    ] = None,
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
) -> None:
    """One DPO stage on pairs: checkpoints, metrics and a Hugging Face directory in OUT/hf. Run again to resume."""
    from drift_jax.manifest import Manifest
    from drift_jax.models.hf import resolve_model
    from drift_jax.records import read_pairs
    from drift_jax.stages.dpo import TrainJob, train_stage
    from drift_jax.stages.export import export_stage
    from drift_jax.stages.identity import export_identity

    resolved = _load(config, overrides, on_bad_row)
    console, model_dir, manifest = Console(), resolve_model(model), Manifest(out)
    reference_dir = resolve_model(reference) if reference else model_dir
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
    console = Console()
    summary = export_stage(config, checkpoint, resolve_model(model), out, console)
    console.print_json(data=dataclasses.asdict(config.export) | summary)


@app.command()
def doctor() -> None:
    """Devices, versions, memory, and which extras are missing with the command that adds them."""
    from drift_jax.doctor import run_doctor

    raise typer.Exit(run_doctor(Console()))


def main() -> None:
    """Console entry point."""
    # transformers brings tokenizers and templates here; that torch is missing is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        app()
    except DriftError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escape(error)}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None


def _escape(error: DriftError) -> str:
    from rich.markup import escape

    return escape(str(error))
