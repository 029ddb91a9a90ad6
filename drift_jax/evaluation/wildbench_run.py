"""A whole WildBench evaluation of one model's outputs: judged, written as upstream's files, summed up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from drift_jax.config import JudgeConfig
from drift_jax.evaluation.elo import elo_ratings, games_of_scores
from drift_jax.evaluation.report import Report, Section, number, with_interval
from drift_jax.evaluation.wildbench import (
    LENGTH_PENALTY,
    REFERENCES,
    WEIGHTS,
    ScoreRow,
    mix_rewards,
    reward_table,
    score_table,
)
from drift_jax.evaluation.wildbench_inputs import file_name, is_itself
from drift_jax.evaluation.wildbench_judge import (
    PAIRWISE_TEMPLATE,
    SCORE_TEMPLATE,
    load_template,
    pair_questions,
    pair_result,
    score_questions,
    score_result,
)
from drift_jax.evaluation.wildbench_rows import Task, pair_rows, score_rows
from drift_jax.files import write_json
from drift_jax.judging import Tally, ask_all

VERDICTS_FILE = "verdicts.jsonl"


@dataclass(frozen=True)
class WildBenchJob:
    """What is judged, by whom, and where it goes."""

    model: str
    tasks: Sequence[Task]
    outputs: Mapping[str, str]  # by session id
    judge: JudgeConfig
    pair_judge: JudgeConfig
    out_dir: Path
    checkout: Path | None = None  # of github.com/allenai/WildBench; None: the hub's templates
    references: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # name -> outputs by session id
    against: Mapping[str, Sequence[ScoreRow]] = field(default_factory=dict)  # scores of others, for ratings
    k: int = LENGTH_PENALTY
    strict: bool = False  # JSON Schema instead of any object
    cache: Path | None = None  # of verdicts; None: in out_dir


def run_wildbench(job: WildBenchJob, console: Console) -> Report:
    """Judges, writes `score.v2/eval=JUDGE/MODEL.json` and `pairwise.v2/eval=JUDGE/ref=NAME/MODEL.json`, and sums up.

    Raises:
      ConfigError: a reference has the model's name, and is not it.
      DataError: a template cannot be had.
      StageError: the judge answers nothing.
    """
    tags = {task.session_id: task.groups for task in job.tasks}
    missing = [task.session_id for task in job.tasks if task.session_id not in job.outputs]
    # Against itself it has no rows, which count as 0 in the mix.
    others = {
        name: outputs
        for name, outputs in job.references.items()
        if not is_itself(job.model, job.outputs, name, outputs, job.tasks)
    }
    table, scored, tallies, templates = _score(job, tags, console)
    rewards: dict[str, dict[str, Any]] = {}
    for reference, outputs in others.items():
        rewards[reference], tallies[f"ref={reference}"], templates["pairwise"] = _pairs(
            job, reference, outputs, tags, console
        )
    short = {name: REFERENCES.get(name, name) for name in job.references}
    mixed = mix_rewards({short[r]: {job.model: rewards[r]} if r in rewards else {} for r in short}, job.k)
    games = games_of_scores({job.model: scored, **job.against})
    data = {
        "model": job.model,
        "judge": job.judge.model,
        "pair_judge": job.pair_judge.model if rewards else None,
        "templates": templates,
        "tasks": len(job.tasks),
        "without_output": len(missing),
        "score": table,
        "rewards": rewards,
        "mixture": mixed.get(job.model),
        "wb_elo": elo_ratings(games) if games else None,
        "judging": {name: tally.row() for name, tally in tallies.items()},
    }
    return _report(data)


def _score(
    job: WildBenchJob, tags: Mapping[str, frozenset[str]], console: Console
) -> tuple[dict[str, Any], tuple[ScoreRow, ...], dict[str, Tally], dict[str, str]]:
    template = load_template(SCORE_TEMPLATE, job.checkout)
    questions = score_questions(job.tasks, job.outputs, template, job.strict)
    judged = ask_all(questions, job.judge, _cache(job), console, "scoring")
    rows = score_result(job.tasks, job.outputs, judged, job.model)
    _write(job.out_dir / "score.v2" / f"eval={file_name(job.judge.model)}" / f"{file_name(job.model)}.json", rows)
    found = score_rows(rows).rows
    return score_table(job.model, found, tags), found, {"score": judged.tally}, {"score": template.hash}


def _pairs(
    job: WildBenchJob,
    reference: str,
    outputs: Mapping[str, str],
    tags: Mapping[str, frozenset[str]],
    console: Console,
) -> tuple[dict[str, Any], Tally, str]:
    template, names = load_template(PAIRWISE_TEMPLATE, job.checkout), (job.model, reference)
    questions = pair_questions(job.tasks, job.outputs, outputs, names, template, job.strict)
    judged = ask_all(questions, job.pair_judge, _cache(job), console, f"comparing with {reference}")
    rows = pair_result(job.tasks, job.outputs, outputs, names, judged)
    folder = job.out_dir / "pairwise.v2" / f"eval={file_name(job.pair_judge.model)}" / f"ref={file_name(reference)}"
    _write(folder / f"{file_name(job.model)}.json", rows)
    table = reward_table(job.model, pair_rows(rows, job.model, reference).rows, tags, job.k)
    return table, judged.tally, template.hash


def _cache(job: WildBenchJob) -> Path:
    return job.cache or job.out_dir / VERDICTS_FILE


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rows)


# --- the report ---------------------------------------------------------------------------------------------


def _report(data: dict[str, Any]) -> Report:
    table = data["score"]
    sections = [_score_section(data["model"], table)]
    if data["rewards"]:
        sections.append(_reward_section(data))
    if data["wb_elo"]:
        rows = [
            [name, f"{found['avg']:.1f}", "{:.1f} to {:.1f}".format(*found["ci"]), str(found["games"])]
            for name, found in data["wb_elo"].items()
        ]
        sections.append(Section("Elo-style ratings", ["model", "rating", "95 % of the orders", "games"], rows))
    return Report(f"WildBench: {data['model']}", sections, _notes(data), data)


def _score_section(model: str, table: Mapping[str, Any]) -> Section:
    low_high = table["score_interval"]
    interval = None if low_high is None else [20 * (end - 5) for end in low_high]
    tenfold = {
        name: None if table[name] is None else 10 * table[name] for name in ("adjusted_score", "task_macro_score")
    }
    columns = ["model", "WB-Score x10", "task macro x10", *WEIGHTS, "rows", "length"]
    categories = table["task_categorized_scores"] or {}
    row = [
        model,
        with_interval(tenfold["adjusted_score"], interval),
        number(tenfold["task_macro_score"]),
        *(number(10 * categories[group] if group in categories else None) for group in WEIGHTS),
        str(table["total"]),
        number(table["avg_len"], ".0f"),
    ]
    return Section("WB-Score", columns, [row])


def _reward_section(data: Mapping[str, Any]) -> Section:
    columns = ["reference", "WB-Reward x100", "task macro x100", "++", "+", "=", "-", "--", "rows"]
    rows, k = [], LENGTH_PENALTY
    for reference, found in data["rewards"].items():
        k, interval = found["K"], found["reward_interval"]
        rows.append(
            [
                reference,
                with_interval(
                    None if found["reward"] is None else 100 * found["reward"],
                    None if interval is None else [100 * end for end in interval],
                ),
                number(None if found["task_macro_reward"] is None else 100 * found["task_macro_reward"]),
                *(str(found[name]) for name in ("win_much", "win", "tie", "lose", "lose_much")),
                str(found["total"]),
            ]
        )
    mixed = data["mixture"]
    if mixed:
        means = [number(mixed[f"mixture_of_rewards.K={k}"]), number(mixed[f"task_macro_reward.K={k}"])]
        rows.append(["mean of the references", *means, *[""] * 6])
    return Section(f"WB-Reward, K = {k}", columns, rows)


def _notes(data: Mapping[str, Any]) -> list[str]:
    notes = [f"Judge: {data['judge']}" + (f", of pairs {data['pair_judge']}" if data["pair_judge"] else "") + "."]
    notes += [f"Template of {name}: {found} (sha256, 16 digits)." for name, found in data["templates"].items()]
    for name, tally in data["judging"].items():
        cost = "" if tally["dollars"] is None else f", {tally['dollars']:.4f} dollars"
        notes.append(
            f"{name}: {tally['answered']} of {tally['questions']} questions answered, {tally['failed']} left out, "
            f"{tally['malformed_answers']} malformed answers, {tally['from_cache']} from the cache, "
            f"{tally['prompt_tokens']} + {tally['completion_tokens']} tokens{cost}."
        )
    if data["without_output"]:
        notes.append(f"{data['without_output']} of {data['tasks']} tasks have no output and are left out.")
    table = data["score"]
    if table["empty"] or table["truncated"]:
        notes.append(
            f"{table['empty']} outputs are empty and {table['truncated']} were cut at the judge's limit: they count "
            "for the score and not for the categories."
        )
    return notes
