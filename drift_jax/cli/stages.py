"""`drift run`, `sample`, `train` and `export`."""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer
from rich.console import Console

from drift_jax.cli.handbook import devices_with_pairs, handbook_run, print_translation
from drift_jax.cli.options import (
    ConfigFile,
    ModelDir,
    OnBadRow,
    OutDir,
    Overrides,
    build_console,
    changes_of,
    in_dir,
    out_dir,
    refuse_handbook,
    resolve,
)
from drift_jax.config import RunConfig, load_config
from drift_jax.distributed import on_each, on_main
from drift_jax.errors import ConfigError, DataError, DriftError, StageError
from drift_jax.parts import NEXT_PART, Part, PartEnd


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
    run_dir: Annotated[Optional[Path], out_dir("Where the run lives; replaces run_dir.", "--run-dir")] = None,  # noqa: UP045
    on_bad_row: OnBadRow = None,
    part: Annotated[Optional[Literal["training", "sampling"]], typer.Option(hidden=True)] = None,  # noqa: UP045
    part_folder: Annotated[Optional[Path], typer.Option(hidden=True)] = None,  # noqa: UP045
) -> None:
    """The whole recipe: seed, then sample -> pair -> train -> export for each iteration. Run again to resume."""
    from drift_jax.recipe import run as run_recipe

    changes = changes_of(overrides, on_bad_row, run_dir=run_dir)
    if handbook is not None:
        resolved = handbook_run(handbook, config, changes)
    elif config is not None:
        refuse_handbook(config)
        resolved = load_config(config, changes)
    else:
        raise ConfigError("give a CONFIG, such as configs/quickstart.yaml, or --handbook FILE.")
    try:
        # See cli/parts.py: with vLLM a run is several processes, and this is one of them.
        run_recipe(resolved, build_console(), Part(part, part_folder) if part and part_folder else None)
    except PartEnd:
        raise typer.Exit(NEXT_PART) from None


def sample(
    config: ConfigFile,
    model: ModelDir,
    input: Annotated[Path, typer.Option("--input", help="JSONL of DSAT records (SAT ones for method spin).")],
    out: OutDir,
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
) -> None:
    """Samples replies for logged records, by `recipe.method`, and writes pairs.train.jsonl and pairs.test.jsonl."""
    from drift_jax.manifest import Manifest
    from drift_jax.stages.identity import sample_identity, sampling_job
    from drift_jax.stages.inputs import run_lock
    from drift_jax.stages.pair import check_choosing, pair_stage
    from drift_jax.stages.sample import sample_stage

    refuse_handbook(config)
    resolved = load_config(config, changes_of(overrides, on_bad_row))
    console = build_console()
    model_dir = on_each(lambda: resolve(model, resolved))
    # All that the user can mend is refused before anything is written.
    _refuse_run(out)
    on_main(lambda: check_choosing(resolved))
    _check_models([model_dir], resolved)
    on_main(lambda: _check_records(resolved, input, out))
    with run_lock(out):
        manifest = on_each(lambda: Manifest(out))
        keys, inputs = on_main(lambda: sample_identity(resolved, manifest, model_dir, input))
        if not on_main(lambda: manifest.enter("sample", keys, inputs)):
            job = on_main(lambda: sampling_job(resolved, inputs, model_dir))
            summary = sample_stage(resolved, model_dir, str(input), out, console, job)
            summary |= on_main(lambda: pair_stage(resolved, inputs["policy"], str(input), out, console))
            on_main(lambda: manifest.finish("sample", summary))
        console.print_json(data=on_main(lambda: manifest.summary("sample")))


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
        in_dir("Directory with pairs.train.jsonl and pairs.test.jsonl; or as above.", "--pairs"),
    ] = None,
    out: Annotated[Optional[Path], out_dir("Directory for the results; or as above.")] = None,  # noqa: UP045
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
    from drift_jax.stages.advice import print_advice
    from drift_jax.stages.dpo import TrainJob, train_stage
    from drift_jax.stages.export import export_stage
    from drift_jax.stages.identity import export_identity
    from drift_jax.stages.inputs import run_lock

    changes, console = changes_of(overrides, on_bad_row), build_console()
    if is_handbook_file(config):
        translation = translate_handbook(config, devices_with_pairs({}, changes))
        print_translation(translation.without_pairs(str(pairs)) if pairs else translation, console)
        resolved = translation.build(changes)
        model, out = model or resolved.model.path, out or Path(resolved.run_dir)
        mixed, own = out / "data", translation.mixture
        _refuse_run(out)
        pairs = pairs or Path(on_main(lambda: str(load_mixture(own, mixed, resolved.data.on_bad_row))))
    elif model is None or pairs is None or out is None:
        given = {"--model": model, "--pairs": pairs, "--out": out}
        missing = ", ".join(option for option, value in given.items() if value is None)
        raise ConfigError(f"{config} is not a handbook file, so {missing} must be given on the command line.")
    else:
        resolved = load_config(config, changes)
        _refuse_run(out)
    model_dir = on_each(lambda: resolve(model, resolved))
    reference_dir = on_each(lambda: resolve(reference, resolved)) if reference else model_dir
    _check_models([model_dir, reference_dir], resolved)
    train_pairs, test_pairs = _find_pairs(pairs, resolved.data.on_bad_row, console)
    job = TrainJob(model_dir, reference_dir, train_pairs, test_pairs, out, resolved.train.epochs)
    print_advice(resolved, console)
    with run_lock(out):
        manifest = on_each(lambda: Manifest(out))
        keys, inputs = on_main(lambda: export_identity(resolved, manifest, job))
        if not on_main(lambda: manifest.enter("train", keys, inputs)):
            summary = train_stage(resolved, job, console, inputs["reference"])
            summary |= export_stage(resolved, out / "checkpoints", model_dir, out / "hf", console)
            on_main(lambda: manifest.finish("train", summary))
        console.print_json(data=on_main(lambda: manifest.summary("train")))


def _check_models(directories: list[Path], config: RunConfig) -> None:
    """Raises `DriftError` where a tokenizer, a template or weights cannot be used."""
    from drift_jax.models.hf import check_weights
    from drift_jax.stages.inputs import open_tokenizer

    for directory in dict.fromkeys(directories):
        on_main(lambda directory=directory: open_tokenizer(directory, config.data.thinking) and None)
        on_main(lambda directory=directory: check_weights(directory))


def _refuse_run(out: Path) -> None:
    """Raises `StageError` for the folder of a `drift run`, and of a stage of one: runs go on from what is there."""
    on_main(lambda: _check_no_run(out))


def _check_no_run(out: Path) -> None:
    from drift_jax.manifest import Manifest

    if any("/" in stage for stage in Manifest(out).stages()):
        raise StageError(
            f"{out} is the folder of a `drift run`, which goes on from what is there. Give --out a directory of its "
            "own."
        )
    above, stages = out.absolute().parent, []
    with contextlib.suppress(DriftError):  # a manifest.json there may be anybody's
        stages = list(Manifest(above).stages())
    if any(stage.startswith(f"{out.absolute().name}/") for stage in stages):
        raise StageError(
            f"{out} is a stage of the `drift run` in {above}, which goes on from what is there. Give --out a directory "
            "of its own."
        )


def _check_records(config: RunConfig, records: Path, out: Path) -> None:
    from drift_jax.manifest import Manifest
    from drift_jax.stages.inputs import load_split, refuse_held_out

    split = load_split(config, str(records))
    if "sample" not in Manifest(out).stages():
        refuse_held_out(split, records)


def _find_pairs(folder: Path, on_bad_row: Literal["error", "skip"], console: Console) -> tuple[Path, Path | None]:
    """The pairs to train on, and those that are held out. Bad rows are refused before anything is written."""
    from drift_jax.records import count_rows, read_pairs

    train, test = folder / "pairs.train.jsonl", folder / "pairs.test.jsonl"
    on_main(lambda: _check_pairs(folder, train))
    is_there = on_main(test.exists)
    held_out = test if is_there and on_main(lambda: count_rows(test)) else None
    if is_there and held_out is None:  # as a pair stage writes it that holds nothing out
        console.print(f"{test} is empty: no pairs are held out", highlight=False, soft_wrap=True, markup=False)
    for path in filter(None, (train, held_out)):
        check = partial(read_pairs, path, on_bad_row)
        on_main(lambda check=check: check() and None)
    return train, held_out


def _check_pairs(folder: Path, train: Path) -> None:
    """Raises `DataError` where there is no file of pairs to train on, with the way to one."""
    if train.exists() or train.is_symlink():
        return
    why = "it holds none" if folder.is_dir() else "that is a file" if folder.exists() else "there is none"
    said = f"--pairs {folder}: a directory with {train.name} (and pairs.test.jsonl) is needed, and {why}."
    others = [folder / name for name in ("seed.train.jsonl", "train.jsonl", "dataset_dict.json", "state.json")]
    if folder.is_file() or any(path.is_file() for path in others):
        said += f" `drift data convert {folder} --to drift --out DIR` writes one: give DIR."
    raise DataError(said)


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
    from drift_jax.stages.export import export_stage, mesh_for_export

    config = build_config({"run_dir": str(out), "model": {"path": model}, "export": {"dtype": dtype}})
    console, source = build_console(), resolve_model(model)
    config = dataclasses.replace(config, mesh=mesh_for_export(source))
    summary = export_stage(config, checkpoint, source, out, console)
    console.print_json(data=dataclasses.asdict(config.export) | summary)
