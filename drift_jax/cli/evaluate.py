"""`drift evaluate`: is it better? WildBench, AlpacaEval 2, and win rates on prompts of one's own."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer
from rich.console import Console

from drift_jax.cli import evaluate_policy
from drift_jax.cli.evaluate_rows import (
    AnnotationsOption,
    RowsOption,
    print_alpaca_rows,
    print_wildbench_rows,
    read_rows,
    refuse_beside_rows,
)
from drift_jax.cli.options import OptionalOutDir, OutDir, Overrides, build_console, resolve
from drift_jax.cli.parts import leave_accelerator, prepare_sample
from drift_jax.cli.processes import across_processes
from drift_jax.distributed import on_each, on_main
from drift_jax.errors import ConfigError

if TYPE_CHECKING:
    from drift_jax.config import RunConfig
    from drift_jax.evaluation.prompts import Prompt
    from drift_jax.evaluation.report import Report
    from drift_jax.evaluation.wildbench_rows import Task
    from drift_jax.evaluation.win_rate_judges import Judgement
    from drift_jax.records import Message

evaluate_app = typer.Typer(
    help="Is it better? WildBench, AlpacaEval 2, and win rates on your own prompts.", no_args_is_help=True
)

Model = Annotated[
    Optional[str],  # noqa: UP045  (typer reads this form on every version)
    typer.Argument(metavar="MODEL", help="Hugging Face model directory or hub id, or a JSON file of its outputs."),
]
Config = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--config", help="YAML file of a run: engine, mesh, vllm and judge are taken from it."),
]
Name = Annotated[Optional[str], typer.Option("--name", help="What the model is called in the results.")]  # noqa: UP045
Cache = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--cache", help="File of verdicts that several evaluations share; default: OUT/verdicts.jsonl."),
]


def _prepare(given: dict[str, Any]) -> bool:
    """Before the processes of a run join: with vLLM, or nothing to sample, this one needs no accelerator."""
    if given.get("rows"):
        leave_accelerator()
        return False
    return prepare_sample(given)


Tasks = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--tasks",
        help="Tasks in the schema of allenai/WildBench v2; default: the hub's. With --rows `hub` names these.",
    ),
]
Checkout = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--wildbench", help="Checkout of github.com/allenai/WildBench, for its judge's templates."),
]
References = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--reference",
        metavar="[NAME=]FILE",
        help="Outputs to compare with, or the name of a model that upstream has run. Repeatable. "
        "With --rows: the name of the reference.",
    ),
]
Against = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--against", metavar="[NAME=]FILE", help="Score rows of another model, for Elo-style ratings. Repeatable."
    ),
]
LengthPenalty = Annotated[
    int, typer.Option("--length-penalty", metavar="K", help="Characters more that make a slight win a tie; -1: off.")
]
PairJudge = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--pair-judge", help="Model that judges pairs; default: judge.model."),
]
Strict = Annotated[
    bool, typer.Option("--json-schema", help="Ask for the template's object by JSON Schema; upstream does not.")
]


def wildbench(
    model: Model = None,
    rows: RowsOption = None,
    tasks: Tasks = None,
    checkout: Checkout = None,
    references: References = None,
    against: Against = None,
    length_penalty: LengthPenalty = 500,
    pair_judge: PairJudge = None,
    strict: Strict = False,
    name: Name = None,
    cache: Cache = None,
    config: Config = None,
    overrides: Overrides = None,
    out: OptionalOutDir = None,
) -> None:
    """WB-Score, WB-Reward and Elo-style ratings, by upstream's tasks and judge's templates. Run again to resume."""
    from drift_jax.evaluation import wildbench_inputs as inputs
    from drift_jax.evaluation import wildbench_judge as judging
    from drift_jax.evaluation.settings import WILDBENCH, require_judge
    from drift_jax.evaluation.wildbench_rows import open_tasks
    from drift_jax.evaluation.wildbench_run import WildBenchJob, run_wildbench

    if rows:
        given = {"MODEL": model, "--wildbench": checkout, "--against": against, "--pair-judge": pair_judge}
        given |= {"--json-schema": strict, "--name": name, "--cache": cache}
        refuse_beside_rows(given | {"--config": config, "--set": overrides, "--out": out})
        on_main(lambda: print_wildbench_rows(rows, tasks, references or (), length_penalty))
        return
    model, out = _required(model, out)
    resolved, console = _resolve_config(model, out, WILDBENCH, config, overrides), build_console()
    judge = require_judge(resolved.judge)
    # All that the user can mend is refused before anything is sampled.
    for template in (judging.SCORE_TEMPLATE, *((judging.PAIRWISE_TEMPLATE,) if references else ())):
        on_main(lambda template=template: judging.load_template(template, checkout) and None)
    found = on_each(lambda: open_tasks(tasks))
    others = inputs.open_all(references, inputs.open_reference, "--reference")
    scored = inputs.open_all(against, inputs.open_scores, "--against")
    own = on_each(lambda: judging.load_outputs(Path(model))) if Path(model).is_file() else None
    label = name or (own[0] if own else _label(model))
    inputs.refuse_own_name(label, scored)
    outputs, drawn, note = (own[1], {}, None) if own else _task_answers(resolved, model, found, out, console)
    job = WildBenchJob(
        model=label,
        tasks=found,
        outputs=outputs,
        judge=judge,
        pair_judge=dataclasses.replace(judge, model=pair_judge or judge.model),
        out_dir=out,
        checkout=checkout,
        references=others,
        against=scored,
        k=length_penalty,
        strict=strict,
        cache=cache,
    )
    on_main(lambda: _write_json(out / "model_outputs.json", judging.output_rows(found, outputs, label, drawn)))
    on_main(lambda: _finish(run_wildbench(job, console), out, console, note, drawn))


Baseline = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--reference-outputs",
        help="The baseline's outputs (dataset, instruction, output, generator), which hold the prompts too; "
        "default: the hub's alpaca_eval_gpt4_baseline.json.",
    ),
]
Annotate = Annotated[
    bool, typer.Option("--annotate", help="Annotate and score with the package alpaca-eval (extra alpaca-eval).")
]
Annotator = Annotated[
    str, typer.Option("--annotator", help="An annotator of the package, or a directory with its configs.yaml.")
]
Gamed = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--df-gamed",
        help="df_gamed.csv of the hub, for the length-controlled win rate; of the prompts of --reference-outputs.",
    ),
]


def alpaca_eval(
    model: Model = None,
    rows: AnnotationsOption = None,
    reference: Baseline = None,
    annotate: Annotate = False,
    annotator: Annotator = "weighted_alpaca_eval_gpt4_turbo",
    gamed: Gamed = None,
    name: Name = None,
    config: Config = None,
    overrides: Overrides = None,
    out: OptionalOutDir = None,
) -> None:
    """AlpacaEval 2: writes model_outputs.json; with --annotate the win rates, by the package. Run again to resume."""
    from drift_jax.evaluation import alpaca_eval as alpaca
    from drift_jax.evaluation.report import Report
    from drift_jax.evaluation.settings import ALPACA_EVAL, require_judge
    from drift_jax.files import write_json
    from drift_jax.records import Message

    if rows:
        given = {"MODEL": model, "--reference-outputs": reference, "--annotate": annotate, "--df-gamed": gamed}
        given |= {"--annotator": annotator != alpaca.ANNOTATOR, "--name": name}
        refuse_beside_rows(given | {"--config": config, "--set": overrides, "--out": out})
        on_main(lambda: print_alpaca_rows(rows))
        return
    model, out = _required(model, out)
    resolved, console = _resolve_config(model, out, ALPACA_EVAL, config, overrides), build_console()
    if annotate:
        require_judge(resolved.judge)
        on_main(lambda: alpaca.check_package())
    baseline = Path(on_main(lambda: str(alpaca.baseline_file(reference))))
    prompts = on_each(lambda: read_rows(baseline))
    alpaca.check_prompts(prompts, str(baseline))
    note, drawn, outputs_path = None, None, out / "model_outputs.json"
    if Path(model).is_file():
        outputs_path = Path(model)
        built = on_each(lambda: read_rows(outputs_path))
        label = name or alpaca.model_of_outputs(built, outputs_path)
    else:
        label = name or _label(model)
        dialogues = {str(i): [Message("user", prompt["instruction"])] for i, prompt in enumerate(prompts)}
        texts, drawn, note = _answers(resolved, model, dialogues, out, console)
        built = alpaca.build_outputs(prompts, [texts[key] for key in dialogues], label)
        on_main(lambda: write_json(outputs_path, built))
    left_out = alpaca.match_outputs(built, prompts, str(outputs_path))
    if not annotate:
        notes = [f"outputs: {outputs_path}; --annotate compares them with {baseline}.", *alpaca.say_left_out(left_out)]
        report = Report("AlpacaEval 2", (), notes, left_out)
    else:
        rates = on_main(lambda: alpaca.annotate(outputs_path, baseline, resolved.judge, annotator, out, gamed))
        report = alpaca.build_report(rates | left_out, label, resolved.judge.model, annotator)
    on_main(lambda: _finish(report, out, console, note, drawn))


def win_rate(
    a: Annotated[str, typer.Argument(metavar="A", help="A model (directory or hub id), or a file of outputs.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What A is compared with, as A.")],
    prompts: Annotated[
        Path, typer.Option("--prompts", help="JSON or JSONL with prompt (messages or a text) or instruction a row.")
    ],
    out: OutDir,
    judge: Annotated[
        Literal["endpoint", "programmatic"],
        typer.Option(help="Who decides: the model of section judge, or a function (--check)."),
    ] = "endpoint",
    check: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--check", metavar="MODULE:FUNCTION", help="Scores an output; the higher score wins."),
    ] = None,
    cache: Cache = None,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Win rate of A over B on your own prompts, each judged in both orders. Run again to resume."""
    from drift_jax.evaluation.entry_points import load_check
    from drift_jax.evaluation.prompts import read_prompts
    from drift_jax.evaluation.settings import WIN_RATE, require_judge
    from drift_jax.evaluation.win_rate_judges import judge_by_endpoint, judge_by_function
    from drift_jax.evaluation.win_rate_report import build_win_rate_report

    if (judge == "programmatic") != (check is not None):
        raise ConfigError("--judge programmatic needs --check MODULE:FUNCTION, and no other judge takes it.")
    function = load_check(check) if check is not None else None
    resolved, console = _resolve_config(a, out, WIN_RATE, config, overrides), build_console()
    if function is None:
        require_judge(resolved.judge)
    asked = on_each(lambda: read_prompts(prompts))
    outputs, notes = [], []
    for side, model in (("a", a), ("b", b)):
        if side == "b" and a == b:
            outputs.append(outputs[0])
            continue
        texts, note = _outputs(resolved, model, asked, out / side, console)
        outputs.append(texts)
        notes += [note] if note else []

    def work() -> None:
        both = [prompt for prompt in asked if prompt.id in outputs[0] and prompt.id in outputs[1]]
        found: Judgement
        if function is not None and check is not None:
            found = judge_by_function(both, outputs[0], outputs[1], function, check)
        else:
            verdicts = cache or out / "verdicts.jsonl"
            found = judge_by_endpoint(both, outputs[0], outputs[1], resolved.judge, verdicts, console)
        report = build_win_rate_report(a, b, found, len(asked) - len(both))
        _finish(report, out, console, "; ".join(notes) or None)

    on_main(work)


for _command, _title in ((wildbench, "wildbench"), (alpaca_eval, "alpaca-eval"), (win_rate, "win-rate")):
    evaluate_app.command(_title)(across_processes(_command, _prepare))
evaluate_app.command("preference")(across_processes(evaluate_policy.preference))
evaluate_app.command("compare")(across_processes(evaluate_policy.compare, evaluate_policy.without_devices))
evaluate_app.command("coverage")(across_processes(evaluate_policy.coverage, evaluate_policy.without_devices))


# --- what they share ----------------------------------------------------------------------------------------


def _required(model: str | None, out: Path | None) -> tuple[str, Path]:
    missing = [option for option, value in (("MODEL", model), ("--out DIR", out)) if value is None]
    if model is None or out is None:
        raise ConfigError(f"{' and '.join(missing)} must be given, or --rows FILE for numbers of a file of rows.")
    return model, out


def _resolve_config(
    model: str, out: Path, drawing: Mapping[str, Any], file: Path | None, overrides: list[str] | None
) -> RunConfig:
    from drift_jax.evaluation.settings import build_evaluation_config

    return build_evaluation_config(model, out, drawing, file, overrides or ())


def _answers(
    config: RunConfig, model: str, dialogues: Mapping[str, list[Message]], out: Path, console: Console
) -> tuple[dict[str, str], dict[str, Any], str | None]:
    """(answers by id, how they were drawn, what is to be said of it)."""
    from drift_jax.evaluation.settings import fit_to_model
    from drift_jax.stages.answer import answer_stage, longest_context
    from drift_jax.stages.inputs import run_lock

    model_dir = on_each(lambda: resolve(model, config))
    fitted, note = fit_to_model(config, longest_context(model_dir))
    with run_lock(out):
        answers = answer_stage(fitted, model_dir, dialogues, out, console, f"answering with {_label(model)}")
    cut = sum(answer.finish_reason == "length" for answer in answers.by_id.values())
    said = [note] if note else []
    if answers.prompts_cut:
        said.append(f"{answers.prompts_cut} prompts lost their beginning (sampling.max_input_length)")
    if cut:
        said.append(f"{cut} of {len(answers.by_id)} answers have no end (sampling.max_new_tokens)")
    names = ("engine", "temperature", "top_p", "top_k", "max_new_tokens", "max_input_length", "seed")
    drawn = {name: getattr(fitted.sampling, name) for name in names} | {"thinking": fitted.data.thinking}
    return {name: answer.text for name, answer in answers.by_id.items()}, drawn, "; ".join(said) or None


def _task_answers(
    config: RunConfig, model: str, tasks: list[Task], out: Path, console: Console
) -> tuple[dict[str, str], dict[str, Any], str | None]:
    """As `_answers`, by session id."""
    from drift_jax.records import Message

    dialogues = {t.session_id: [Message(turn["role"], turn["content"]) for turn in t.conversation] for t in tasks}
    return _answers(config, model, dialogues, out, console)


def _outputs(
    config: RunConfig, model: str, prompts: list[Prompt], out: Path, console: Console
) -> tuple[dict[str, str], str | None]:
    """(outputs by prompt id, what is to be said of them), of a file or a model."""
    from drift_jax.evaluation.prompts import read_outputs

    if Path(model).is_file():
        return on_each(lambda: read_outputs(Path(model), prompts))
    texts, _, note = _answers(config, model, {p.id: list(p.messages) for p in prompts}, out, console)
    return texts, note and f"{_label(model)}: {note}"


def _label(model: str) -> str:
    """A model by its directory; RUN/iter_2/hf is RUN-iter_2, also where it is named from within RUN."""
    path = Path(os.path.abspath(model)) if Path(model).is_dir() else Path(model)
    return "-".join(path.parts[-3:-1]) if len(path.parts) > 2 and path.name == "hf" else path.name or model


def _finish(
    report: Report, out: Path, console: Console, note: str | None, drawn: Mapping[str, Any] | None = None
) -> None:
    """Writes and shows a report. `note`: what is to be said of the answers; `drawn`: how they were."""
    from drift_jax.evaluation.report import print_report, write_report

    notes = [*report.notes, *([f"{note}."] if note else [])]
    report = dataclasses.replace(
        report, notes=notes, data=dict(report.data) | {"sampling": drawn or None, "note": note}
    )
    write_report(report, out)
    print_report(report, console)
    console.print(f"{out / 'report.md'}, {out / 'report.json'}", markup=False, highlight=False, soft_wrap=True)


def _write_json(path: Path, value: Any) -> None:
    from drift_jax.files import write_json

    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, value)
