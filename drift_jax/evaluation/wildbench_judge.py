"""Judges outputs on WildBench's tasks by upstream's own templates, and writes upstream's result rows.

The templates are read from the user's checkout of github.com/allenai/WildBench, or from the hub, when they are needed:
another wording would give other numbers. Where this departs from upstream's scripts:

1. A placeholder that a user or a model has written stays text; upstream fills it too, where its turn comes later.
2. Who is A and who is B is drawn per task and reference, so that it does not depend on which tasks are asked.
3. An empty output is not shown to a judge. It has the score 1 and loses clearly, as upstream's scripts have it where
   they do not ask in batches.
4. Text around the object of an answer is passed over; upstream leaves such an answer out.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift_jax.errors import DataError
from drift_jax.evaluation.json_rows import read_json
from drift_jax.evaluation.wildbench import CUT_MARK, EMPTY_TEXT
from drift_jax.evaluation.wildbench_rows import CHOICES, Task
from drift_jax.judge import JudgePrompt
from drift_jax.judging import Judged, Question
from drift_jax.reading import read_text

SCORE_TEMPLATE, PAIRWISE_TEMPLATE = "eval_template.score.v2.md", "eval_template.pairwise.v2.md"
MAX_WORDS = 1000  # of each text in a prompt
_HUB = "allenai/WildBench"
_OUTPUTS_ON_HUB = "allenai/WildBench-V2-Model-Outputs"
_GAPS = {
    SCORE_TEMPLATE: ("history", "user_query", "model_output", "checklist"),
    PAIRWISE_TEMPLATE: ("history", "user_query", "candidate_A", "candidate_B", "checklist"),
}
_EMPTY_SCORE = {"strengths": "N/A", "weaknesses": "The model output is empty.", "score": "1"}
_STRING = {"type": "string"}
_SCHEMAS: Mapping[str, Mapping[str, Any]] = {
    SCORE_TEMPLATE: {
        "strengths": _STRING,
        "weaknesses": _STRING,
        "score": {"type": "string", "enum": [str(score) for score in range(1, 11)]},
    },
    PAIRWISE_TEMPLATE: {
        "analysis of A": _STRING,
        "analysis of B": _STRING,
        "reason of A=B": _STRING,
        "reason of A>B": _STRING,
        "reason of B>A": _STRING,
        "choice": {"type": "string", "enum": list(CHOICES)},
    },
}


def load_template(name: str, checkout: Path | None) -> JudgePrompt:
    """One of upstream's templates, from a checkout (its root or its `evaluation/`) or else from the hub.

    Raises:
      DataError: it is not there, or has not the gaps that upstream's has.
    """
    text = _read_template(name, checkout)
    missing = [gap for gap in _GAPS[name] if f"{{${gap}}}" not in text]
    if missing:
        raise DataError(f"{name} has no place for {', '.join(missing)}: it is not WildBench's template of v2.")
    return JudgePrompt(name, text)


def _read_template(name: str, checkout: Path | None) -> str:
    if checkout is not None:
        for path in (checkout / "evaluation" / name, checkout / name):
            if path.is_file():
                return read_text(path)
        raise DataError(f"{checkout} holds no evaluation/{name}: give a checkout of github.com/allenai/WildBench.")
    from huggingface_hub import hf_hub_download

    problem = ""
    for kind in ("dataset", "space"):
        try:
            found = hf_hub_download(_HUB, f"evaluation/{name}", repo_type=kind)
        except Exception as error:  # no network, no such file: the library has many
            problem = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        else:
            return Path(found).read_text(encoding="utf-8")
    raise DataError(
        f"the hub did not give {name} ({problem}). Clone https://github.com/allenai/WildBench and name the directory "
        "with --wildbench DIR."
    )


def load_outputs(path: Path) -> tuple[str, dict[str, str]]:
    """(name of the model, output by session id) of a file of outputs as upstream has them.

    Raises:
      DataError: rows have no session_id or no output, or are of several models.
    """
    return _outputs_of(read_json(path, "outputs of a model (session_id, output, generator)"), str(path), path.stem)


def hub_outputs(model: str) -> tuple[str, dict[str, str]]:
    """As `load_outputs`, of a model that upstream has run."""
    import datasets

    try:
        rows = datasets.load_dataset(_OUTPUTS_ON_HUB, model, split="train")
    except Exception as error:  # as in `wildbench_rows.hub_tasks`
        raise DataError(
            f"{model} is no file, and the hub gave no outputs of such a model ({type(error).__name__}: "
            f"{str(error)[:200]}). Give NAME=FILE with its outputs."
        ) from error
    return _outputs_of([dict(row) for row in rows], _OUTPUTS_ON_HUB, model)


def _outputs_of(rows: Sequence[Mapping[str, Any]], source: str, name: str) -> tuple[str, dict[str, str]]:
    outputs, bad = dict[str, str](), list[str]()
    for number, row in enumerate(rows, 1):
        text = row.get("output")
        text = text[0] if isinstance(text, list) and text else text
        if not isinstance(text, str) or row.get("session_id") is None:
            bad.append(f"  {source}, row {number}: session_id and output (a string or a list of one) are needed")
        else:
            outputs[str(row["session_id"])] = text
    generators = {str(row["generator"]) for row in rows if row.get("generator")}
    if bad or len(generators) > 1:
        shown = bad[:20] or [f"  {source} holds outputs of several models: {', '.join(sorted(generators))}"]
        raise DataError("outputs cannot be used:\n" + "\n".join(shown))
    return (generators.pop() if generators else name), outputs


def output_rows(tasks: Sequence[Task], outputs: Mapping[str, str], model: str, configs: Mapping[str, Any]) -> list[Any]:
    """Outputs as upstream's inference writes them."""
    return [
        {
            "session_id": task.session_id,
            "chat_history": [turn["content"] for turn in task.conversation],
            "output": [outputs[task.session_id]],
            "generator": model,
            "configs": dict(configs),
            "dataset": "wild_bench_v2",
        }
        for task in tasks
        if task.session_id in outputs
    ]


# --- questions ----------------------------------------------------------------------------------------------


def shorten(text: str) -> str:
    """At most `MAX_WORDS` words, counted between single spaces, with upstream's mark where it was cut."""
    words = text.split(" ")
    return text if len(words) <= MAX_WORDS else " ".join(words[:MAX_WORDS]) + CUT_MARK


def fill(template: JudgePrompt, task: Task, **texts: str) -> str:
    """The prompt for a task; `texts` are shortened already."""
    spoken = {"user": "USER", "assistant": "ASSISTANT"}
    history = "".join(
        f"{spoken[turn['role']]}: {turn['content']}\n\n" for turn in task.conversation[:-1] if turn["role"] in spoken
    )
    values = {
        "history": shorten(history),
        "user_query": shorten(task.conversation[-1]["content"]),
        "checklist": "".join(f"- {item}\n" for item in task.checklist),
        **texts,
    }
    pattern = "|".join(re.escape(f"{{${gap}}}") for gap in values)
    return re.sub(pattern, lambda found: values[found[0][2:-1]], template.text)


def _schema(template: JudgePrompt, strict: bool) -> dict[str, Any] | None:
    if not strict:
        return None
    properties = _SCHEMAS[template.name]
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _score_of(answer: Mapping[str, Any]) -> float:
    score = float(answer["score"])
    if not (math.isfinite(score) and 1 <= score <= 10):
        raise ValueError(f"score must be from 1 to 10, found {answer['score']!r}")
    return score


def _choice_of(answer: Mapping[str, Any]) -> str:
    if answer["choice"] not in CHOICES:
        raise ValueError(f"choice must be one of {', '.join(CHOICES)}, found {answer['choice']!r}")
    return answer["choice"]


def score_questions(
    tasks: Sequence[Task], outputs: Mapping[str, str], template: JudgePrompt, strict: bool
) -> list[Question[float]]:
    """One for each task with an output that is not empty.

    Args:
      strict: asks the server for the template's object by JSON Schema; else for any object, as upstream does.
    """
    return [
        Question(
            f"score:{task.session_id}",
            fill(template, task, model_output=shorten(outputs[task.session_id])),
            _schema(template, strict),
            _score_of,
        )
        for task in tasks
        if outputs.get(task.session_id, "").strip()
    ]


def score_result(
    tasks: Sequence[Task], outputs: Mapping[str, str], judged: Judged[float], model: str
) -> list[dict[str, Any]]:
    """Upstream's rows of a score file, for tasks that have a score."""
    rows = []
    for task in tasks:
        name = f"score:{task.session_id}"
        if task.session_id not in outputs or (outputs[task.session_id].strip() and name not in judged.values):
            continue
        answer = judged.rows[name]["answer"] if name in judged.rows else _EMPTY_SCORE
        rows.append(
            {
                "session_id": task.session_id,
                "parsed_result": answer,
                "meta_data": _meta(judged, name),
                "model_test": model,
                "score": answer["score"],
                "model_output": shorten(outputs[task.session_id]).strip(),
            }
        )
    return rows


@dataclass(frozen=True)
class Seat:
    """Who is A and who is B for one task."""

    a: str
    b: str


def seat(task: Task, model: str, reference: str) -> Seat:
    """Drawn by the task and the reference."""
    first = random.Random(f"{task.session_id}:{reference}").random() < 0.5
    return Seat(model, reference) if first else Seat(reference, model)


def pair_questions(
    tasks: Sequence[Task],
    outputs: Mapping[str, str],
    reference_outputs: Mapping[str, str],
    names: tuple[str, str],
    template: JudgePrompt,
    strict: bool,
) -> list[Question[str]]:
    """One for each task of which both outputs are there and not empty. `names`: of the model and the reference."""
    model, reference = names
    questions = []
    for task in tasks:
        texts = {model: outputs.get(task.session_id, ""), reference: reference_outputs.get(task.session_id, "")}
        if not all(text.strip() for text in texts.values()):
            continue
        seats = seat(task, model, reference)
        shown = {"candidate_A": shorten(texts[seats.a]), "candidate_B": shorten(texts[seats.b])}
        name = f"{reference}:{task.session_id}"
        questions.append(Question(name, fill(template, task, **shown), _schema(template, strict), _choice_of))
    return questions


def pair_result(
    tasks: Sequence[Task],
    outputs: Mapping[str, str],
    reference_outputs: Mapping[str, str],
    names: tuple[str, str],
    judged: Judged[str],
) -> list[dict[str, Any]]:
    """Upstream's rows of a pairwise file, for tasks that have a verdict."""
    model, reference = names
    rows = []
    for task in tasks:
        if task.session_id not in outputs or task.session_id not in reference_outputs:
            continue
        texts = {model: outputs[task.session_id], reference: reference_outputs[task.session_id]}
        seats, name = seat(task, model, reference), f"{reference}:{task.session_id}"
        if name in judged.rows:
            answer = judged.rows[name]["answer"]
        elif not all(text.strip() for text in texts.values()):
            answer = _empty_choice(texts[seats.a], texts[seats.b])
        else:
            continue
        side, extent = CHOICES[answer["choice"]]
        rows.append(
            {
                "session_id": task.session_id,
                "parsed_result": answer,
                "meta_data": _meta(judged, name),
                "model_A": seats.a,
                "model_B": seats.b,
                "winner": {"A": seats.a, "B": seats.b, "tie": "tie"}[side],
                "extent": extent,
                "model_outputs": {name: shorten(text).strip() or EMPTY_TEXT for name, text in texts.items()},
            }
        )
    return rows


def _empty_choice(a: str, b: str) -> dict[str, str]:
    if not a.strip() and not b.strip():
        return {"reason": "Both responses are empty.", "choice": "A=B"}
    side, choice = ("A", "B++") if not a.strip() else ("B", "A++")
    return {"reason": f"The response {side} is empty.", "choice": choice}


def _meta(judged: Judged[Any], name: str) -> dict[str, Any]:
    row = judged.rows.get(name)
    if row is None:
        return {"batch_req_id": None, "usage": None, "error": None}
    usage = {key: row[key] for key in ("prompt_tokens", "completion_tokens")}
    return {
        "batch_req_id": row["key"][:16],
        "usage": usage | {"total_tokens": sum(usage.values())},
        "error": None,
    }
