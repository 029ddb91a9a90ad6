"""`drift evaluate preference`, `coverage` and `compare`: what needs no judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from drift_jax.cli.options import OnBadRow, Overrides, build_console, changes_of, out_dir, resolve
from drift_jax.cli.parts import leave_accelerator
from drift_jax.distributed import on_each, on_main
from drift_jax.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from drift_jax.config import RunConfig
    from drift_jax.evaluation.coverage_settings import CoverageConfig
    from drift_jax.evaluation.replies import Reply

ConfigOption = Annotated[
    Optional[Path],  # noqa: UP045  (typer reads this form on every version)
    typer.Option("--config", help="YAML file of a run, for a MODEL: lengths, beta, dtypes and mesh are taken from it."),
]


def preference(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN|MODEL", help="A run (each of its stages), one of its stages, or a model directory or hub id."
        ),
    ],
    pairs: Annotated[Path, typer.Option("--pairs", help="JSONL of pairs (prompt, chosen, rejected), as TRL has them.")],
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--reference", help="Reference model; default: the one that each stage was trained against."),
    ] = None,
    config: ConfigOption = None,
    overrides: Overrides = None,
    on_bad_row: OnBadRow = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        out_dir("Directory for report.json, report.md and the scores of every pair."),
    ] = None,
) -> None:
    """Implicit reward accuracy and margin, log-probs per token and lengths, on pairs, with intervals."""
    from drift_jax.evaluation.preference import preference_numbers
    from drift_jax.evaluation.preference_report import build_preference_report
    from drift_jax.evaluation.report import print_report, write_report
    from drift_jax.files import write_jsonl
    from drift_jax.stages.preference import Target, describe, find_targets, is_run, score_targets

    given, console = Path(model), build_console()
    run = on_each(lambda: is_run(given))
    resolved = _config_of(model, given if run else None, config, changes_of(overrides, on_bad_row))
    against = on_each(lambda: resolve(reference, resolved)) if reference else None
    if run:
        targets = on_each(lambda: find_targets(resolved, given, against))
    elif against is None:
        raise ConfigError(f"{model} is no run, so there is no reference: name one with --reference DIR.")
    else:
        targets = [Target(given.name, on_each(lambda: resolve(model, resolved)), against)]
    scored = score_targets(resolved, targets, pairs, console)

    def work() -> None:
        beta = resolved.train.beta
        found = {name: preference_numbers(logps, beta) for name, logps in scored.of.items()}
        stages = {name: where | found[name] for name, where in describe(targets).items()}
        report = build_preference_report(stages, str(pairs), scored.drops)
        if out is not None:
            write_report(report, out)
            for name, logps in scored.of.items():
                write_jsonl(out / f"scores.{name}.jsonl", logps.rows(beta))
        print_report(report, console)

    on_main(work)


def coverage(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]FILE|RUN...",
            help="Replies of each method: completions, pairs (the chosen side), outputs; a run's last iteration.",
        ),
    ],
    out: Annotated[Path, out_dir("Directory for the report, the map and the points.")],
    settings: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--settings", help="YAML file of the choices below; what each is stands in the README."),
    ] = None,
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--set", metavar="KEY=VALUE", help="One of the choices, such as reward=column:score or seed=1. Repeatable."
        ),
    ] = None,
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--prompts", help="Dialogues by id, for files without: DSAT records, pairs, prompts."),
    ] = None,
    policy: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--policy", help="For reward=implicit: the model whose rewards they are."),
    ] = None,
    reference: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--reference", help="For reward=implicit: what it is compared with."),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """How much of the region of high rewards each method's replies cover, on one map, with a plot."""
    from drift_jax.evaluation.coverage_settings import load_settings
    from drift_jax.evaluation.embed import check_packages
    from drift_jax.evaluation.replies import name_sources

    chosen, console = on_each(lambda: load_settings(settings, overrides or ())), build_console()
    if (chosen.reward == "implicit") != (policy is not None and reference is not None):
        raise ConfigError("--policy and --reference belong to --set reward=implicit, which needs both.")
    on_each(lambda: check_packages(chosen))  # before anything is computed
    files = on_each(lambda: name_sources(sources))
    replies, drops = on_each(lambda: _read_all(files, prompts, chosen.prompts == "common"))
    rewards = _implicit(policy, reference, replies, config) if policy and reference else None
    on_main(lambda: _write_coverage(out, chosen, files, replies, drops, rewards, console))


def _write_coverage(
    out: Path,
    chosen: CoverageConfig,
    files: Mapping[str, Path],
    replies: Sequence[Reply],
    drops: Mapping[str, Mapping[str, int]],
    rewards: Callable[[Sequence[Reply]], list[float]] | None,
    console: Console,
) -> None:
    """The report, the map as a page and as a picture, and the points; what was found is shown."""
    from drift_jax.evaluation.coverage_run import build_coverage_report, draw_map, write_points
    from drift_jax.evaluation.figures import draw_coverage
    from drift_jax.evaluation.page import render_page
    from drift_jax.evaluation.report import print_report, write_report
    from drift_jax.files import atomic_writer

    found = draw_map(list(files), replies, chosen, rewards, console)
    report = build_coverage_report(found, chosen, files, drops)
    write_report(report, out)
    write_points(found, out / "points.csv")
    svg = draw_coverage(found, list(files), out, chosen.projection.upper())
    with atomic_writer(out / "coverage.html") as file:
        file.write(render_page(report, svg))
    print_report(report, console)
    console.print(f"{out / 'coverage.html'}", markup=False, highlight=False, soft_wrap=True)


def _read_all(
    files: Mapping[str, Path], prompts: Path | None, common: bool
) -> tuple[list[Reply], dict[str, dict[str, int]]]:
    """Replies of all methods, and of each method why how many are left out."""
    from drift_jax.evaluation.prompts import read_prompts
    from drift_jax.evaluation.replies import keep_common, read_replies

    dialogues = {prompt.id: prompt for prompt in read_prompts(prompts)} if prompts else {}
    read = {name: read_replies(name, path, dialogues) for name, path in files.items()}
    replies = [reply for found, _ in read.values() for reply in found]
    drops: dict[str, dict[str, int]] = {name: {"empty": empty} for name, (_, empty) in read.items()}
    if common:
        replies, left = keep_common(replies)
        for name, count in left.items():
            drops[name]["to prompts that not all methods have replies to"] = count
    return replies, drops


def _implicit(
    policy: str, reference: str, replies: Sequence[Reply], file: Path | None
) -> Callable[[Sequence[Reply]], list[float]]:
    """The implicit rewards of replies, all computed here: the devices of every process take part."""
    from drift_jax.records import Message
    from drift_jax.stages.preference import implicit_rewards

    without = [reply.prompt for reply in replies if not reply.messages]
    if without:
        raise ConfigError(
            f"{len(without)} replies have no dialogue, such as {without[0]!r}: name the file that has it (--prompts)."
        )
    resolved = _config_of(policy, None, file, [])
    asked = [
        (f"{r.method}/{r.prompt}/{r.sample}", [Message(m["role"], m["content"]) for m in r.messages], r.text)
        for r in replies
    ]
    found = implicit_rewards(resolved, policy, reference, asked, build_console())
    of = {reply.key: reward for reply, reward in zip(replies, found, strict=True)}
    return lambda ordered: [of[reply.key] for reply in ordered]


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="[NAME=]RUN...", help="Run directories, or folders with reports of drift evaluate."),
    ],
    out: Annotated[Path, out_dir("Directory for compare.md, .csv, .html, .svg and .png.")],
    metrics: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--metric", help="Show metrics whose name contains this. Repeatable; default: the main ones."),
    ] = None,
) -> None:
    """Runs side by side over their iterations: what they and their evaluations have left, with intervals."""
    from drift_jax.evaluation.compare import build_compare_report, build_series, choose_metrics, collect, write_table
    from drift_jax.evaluation.figures import draw_lines, has_matplotlib
    from drift_jax.evaluation.page import render_page
    from drift_jax.evaluation.report import print_report, write_report
    from drift_jax.files import atomic_writer

    console = build_console()

    def work() -> None:
        measures, passed = collect(runs)
        chosen = choose_metrics(measures, metrics or ())
        report = build_compare_report(measures, chosen, passed)
        write_report(report, out, "compare")
        write_table(measures, out / "compare.csv")
        svg = draw_lines(*build_series(measures, chosen), out) if has_matplotlib() else None
        with atomic_writer(out / "compare.html") as file:
            file.write(render_page(report, svg))
        print_report(report, console)
        if svg is None:
            console.print("no plot: it needs matplotlib, pip install 'drift-jax[analysis]'", markup=False)
        console.print(f"{out / 'compare.html'}", markup=False, highlight=False, soft_wrap=True)

    on_main(work)


def without_devices(given: dict[str, Any]) -> bool:
    """Before the processes join: what reads files only must not take an accelerator from a run."""
    if given.get("policy") is None:
        leave_accelerator()
    return False


def _config_of_run(path: Path, changes: list[str]) -> RunConfig:
    from drift_jax.config import apply_override, build_config, merge_configs
    from drift_jax.yaml_files import read_yaml

    # Runs from before there was the key were made as `template` says.
    raw = merge_configs({"data": {"thinking": "template"}}, read_yaml(path))
    for change in changes:
        apply_override(raw, change)
    return build_config(raw, source=str(path))


def _config_of(model: str, run: Path | None, file: Path | None, changes: list[str]) -> RunConfig:
    """Of a run its own; of a model `file`, or defaults."""
    from drift_jax.config import build_config
    from drift_jax.evaluation.settings import name_model
    from drift_jax.stages.preference import run_folder
    from drift_jax.yaml_files import read_yaml

    if run is not None:
        if file is not None:
            raise ConfigError(f"{run} has a config of its own: leave --config out, and change keys with --set.")
        return on_each(lambda: _config_of_run(run_folder(run) / "config.yaml", changes))
    raw: dict[str, Any] = on_each(lambda: read_yaml(file)) if file is not None else {"run_dir": "."}
    name_model(raw, model, changes)
    return on_each(lambda: build_config(raw, source=str(file) if file is not None else "the options"))
