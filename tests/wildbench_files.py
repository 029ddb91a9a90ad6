"""Tasks and outputs in WildBench's schemas, a stand-in for a checkout with its templates, and judges that answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.http_servers import Answer

TAGS = ("Coding & Debugging", "Math", "Creative Writing", "Planning", "Advice seeking")
# Words of our own; only the names of files and gaps are upstream's.
SCORE = "History:\n{$history}\nAsked: {$user_query}\nReply: {$model_output}\nLook at:\n{$checklist}\n"
SCORE += (
    'Score it as JSON. Answer with this and nothing else: {"strengths": "short", "weaknesses": "none", "score": "7"}'
)
PAIRWISE = "History:\n{$history}\nAsked: {$user_query}\nA: {$candidate_A}\n--\nB: {$candidate_B}\n--\n"
PAIRWISE += "{$checklist}\nWhich? JSON."


def write_checkout(folder: Path) -> Path:
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation/eval_template.score.v2.md").write_text(SCORE)
    (folder / "evaluation/eval_template.pairwise.v2.md").write_text(PAIRWISE)
    return folder


def write_tasks(path: Path, count: int = 16) -> Path:
    tasks = [
        {
            "session_id": f"task{i:02}",
            "conversation_input": [
                *([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}] if i % 2 else []),
                {"role": "user", "content": f"Say number {i}.", "language": "English", "redacted": False},
            ],
            "checklist": [f"Is {i} said?", "Is it polite?"],
            "primary_tag": TAGS[i % len(TAGS)],
            "secondary_tags": ["Reasoning"] if i % 3 == 0 else [],
            "references": {},
        }
        for i in range(count)
    ]
    path.write_text(json.dumps(tasks))
    return path


def write_outputs(path: Path, model: str, texts: dict[int, str]) -> Path:
    rows = [{"session_id": f"task{i:02}", "output": [text], "generator": model} for i, text in texts.items()]
    path.write_text(json.dumps(rows))
    return path


def answer(text: str, **usage: int) -> Answer:
    usage = usage or {"prompt_tokens": 100, "completion_tokens": 10}
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}


def judge_of(verdict: Callable[[str], dict[str, Any] | str | Answer]) -> Callable[[str, Any], Answer]:
    """A server's `reply` that answers with a verdict on the prompt: an object, a text, or an answer as it is."""

    def reply(path: str, body: Any) -> Answer:
        found = verdict(body["messages"][0]["content"])
        if isinstance(found, tuple):
            return found
        return answer(found if isinstance(found, str) else json.dumps(found))

    return reply
