"""The data card beside mined files: where they come from, by which rules, how many, with which hashes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from jinja2 import Environment

# Of the corpora as they were published; a copy of your own logs has your own licence.
PUBLISHED = {
    "wildfeedback": ("odc-by", "microsoft/WildFeedback"),
    "wildchat": ("odc-by", "allenai/WildChat-1M"),
    "ultrafeedback": ("mit", "openbmb/UltraFeedback"),
}


def render_card(stats: Mapping[str, Any]) -> str:
    """Markdown with the head that the Hugging Face hub reads."""
    files = stats["files"]
    held = {"dsat": ["dsat.jsonl"], "sat": ["sat.jsonl"], "seed": ["seed.train.jsonl", "seed.test.jsonl"]}
    configs = []
    for name, paths in held.items():
        if sum(stats["records"][name].values()):
            splits = [{"split": "test" if ".test." in path else "train", "path": path} for path in paths]
            configs.append({"config_name": name, "data_files": [s for s in splits if files[s["path"]]["rows"]]})
    licence = stats["license"]
    head = {"license": licence["id"] or "unknown", "task_categories": ["text-generation"]} | (
        {"configs": configs} if configs else {}
    )
    text = yaml.safe_dump(head, sort_keys=False)
    rules = yaml.safe_dump(stats["rules"], sort_keys=False, allow_unicode=True)
    # Plain Markdown: what comes from outside are names, which stand in code spans.
    environment = Environment(autoescape=False, trim_blocks=True, lstrip_blocks=True)  # noqa: S701
    environment.filters["code"] = _code
    return environment.from_string(_CARD).render(head=text, rules=rules, stats=stats, published=PUBLISHED)


def _code(text: object) -> str:
    """A code span in a table; no back-tick, line or column can end it."""
    plain = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{plain}`"


_CARD = """---
{{ head }}---

# Dissatisfaction data mined from chat logs

Made by `drift mine --format {{ stats.format }}`. The same input and rules give the same bytes.

## Source

| name | rows | revision | sha256 of the file |
|---|---:|---|---|
{% for source in stats.sources %}
| {{ source.name | code }} | {{ source.rows }} | {{ (source.revision or '-') | code }} |
{{- ' ' }}{{ (source.sha256 or '-') | code }} |
{% endfor %}

Licence: {{ stats.license.id or 'not known; whoever passes these files on must find out' }}. {{ stats.license.why }}

## Files

| file | rows | held out | sha256 |
|---|---:|---:|---|
{% for name, file in stats.files.items() %}
| {{ name | code }} | {{ file.rows }} | {{ file.test_rows }} | {{ file.sha256 | code }} |
{% endfor %}

`dsat.jsonl` holds replies that a user was unhappy with (`prompt`, `rejected`, `user_preference`), `sat.jsonl` replies
that a user was happy with (`prompt`, `chosen`, `user_preference`), `seed.*.jsonl` pairs of a rejected reply and the one
after the complaint. Conversations that begin with the same user message are on one side of the split, in all files.

The held-out rows of `dsat.jsonl` and `sat.jsonl` stand first. A run reads one of the two: give `data.test_rows` the
number of that file.

{% if stats.files['dsat.jsonl'].rows %}
* `data.dsat: dsat.jsonl` (all methods but `spin`): `data.test_rows: {{ stats.files['dsat.jsonl'].test_rows }}`
{% endif %}
{% if stats.files['sat.jsonl'].rows %}
* `data.sat: sat.jsonl` (`recipe.method: spin`): `data.test_rows: {{ stats.files['sat.jsonl'].test_rows }}`
{% endif %}

With a smaller number, held-out rows are trained on; with a larger one, rows for training are held out.
{% for note in stats.notes %}

{{ note }}
{% endfor %}

## What was left out

{{ stats.rows.read }} rows were read, {{ stats.rows.bad }} of them were broken and left out; they held
{{ stats.conversations }} conversations.

| at | reason | count |
|---|---|---:|
{% for stage, reasons in stats.left_out.items() %}{% for reason, count in reasons.items() %}
| {{ stage }} | {{ reason | code }} | {{ count }} |
{% endfor %}{% endfor %}

{% if stats.masked %}
Personal data was masked by patterns: {% for kind, count in stats.masked.items() %}{{ kind }} {{ count }}
{{- ', ' if not loop.last else '.' }}{% endfor %}

{% elif stats.rules.hygiene.mask_pii %}
Personal data was looked for by patterns, none was found.
{% else %}
Personal data was not masked (`hygiene.mask_pii: true` does it, by patterns).
{% endif %}
Addresses, headers, countries and states of users are not read.

## Rules

```yaml
{{ rules }}```

## What is not known

Labels and detectors err: read examples in `mined.html` before training. For WildFeedback's labels its authors report a
precision of 83 % and a recall of 48 %.
"""
