"""mined.html: what was found, to look at. One file, no scripts, nothing from elsewhere; all text is escaped.

Chat text is hostile input: it goes through jinja2's autoescape alone, and the page's policy forbids scripts besides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import Environment

from drift_jax.records import Row

_SHOWN = 1500  # characters of a message
_MESSAGES = 3  # of a prompt, its last ones
_WIDTH = 420  # pixels of the longest bar
_COLOURS = {"dsat": "#c44e52", "sat": "#55a868", "seed": "#4c72b0"}


class Bar(NamedTuple):
    """A bar with its label."""

    label: str
    count: int
    width: float
    colour: str


def render_page(stats: Mapping[str, Any], examples: Sequence[Row]) -> str:
    """The page for a stats.json and some rows of dsat.jsonl."""
    charts = {
        f"Characters of {part} (mean {values['mean']:,.0f})": _bars(
            {f"up to {int(most):,}": count for most, count in values["up_to"].items()}, "#8c8c8c"
        )
        for part, values in stats["lengths"].items()
    }
    turns = {
        kind: _bars({f"user turn {turn}": count for turn, count in counts.items()}, _COLOURS[kind])
        for kind, counts in stats["turns"].items()
        if counts
    }
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(_PAGE)
        .render(
            stats=stats,
            charts=charts,
            turns=turns,
            examples=[_example(row) for row in examples],
            colours=_COLOURS,
            width=_WIDTH,
        )
    )


def _bars(counts: Mapping[str, int], colour: str) -> list[Bar]:
    most = max(counts.values(), default=1) or 1
    return [Bar(label, count, round(_WIDTH * count / most, 1), colour) for label, count in counts.items()]


def _example(row: Row) -> dict[str, Any]:
    return {
        "id": row["id"],
        "split": row["meta"]["split"],
        "earlier": max(0, len(row["prompt"]) - _MESSAGES),
        "prompt": [{"role": m["role"], "content": _cut(m["content"])} for m in row["prompt"][-_MESSAGES:]],
        "rejected": _cut(row["rejected"][0]["content"]),
        "complaint": _cut(row["user_preference"]["content"]),
        "evidence": json.dumps(row["meta"]["evidence"], ensure_ascii=False, indent=1),
    }


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ... ({len(text) - _SHOWN:,} more characters)"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Mined from {{ stats.sources | map(attribute='name') | join(', ') }}</title>
<style>
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:62em;padding:0 1em;color:#222;background:#fff}
h2{margin-top:2em}
table{border-collapse:collapse}
td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}
td:first-child,th:first-child{text-align:left}
svg{max-width:100%;height:auto}
text{font:12px system-ui,sans-serif;fill:#222}
.said{white-space:pre-wrap;overflow-wrap:anywhere;border-left:4px solid #ccc;padding:.3em .8em;margin:.4em 0}
.rejected{border-color:#c44e52}
.complaint{border-color:#e0a800;background:#fff6d6}
.role{font-size:80%;color:#666}
article{border:1px solid #ddd;border-radius:6px;padding:.6em 1em;margin:1em 0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:85%;color:#444}
</style></head><body>
{% macro chart(bars, what) %}
{% set wide, high = width + 240, bars | length * 20 + 4 %}
<svg role="img" aria-label="{{ what }}" width="{{ wide }}" height="{{ high }}" viewBox="0 0 {{ wide }} {{ high }}">
{% for bar in bars %}
<text x="130" y="{{ loop.index0 * 20 + 14 }}" text-anchor="end">{{ bar.label }}</text>
<rect x="138" y="{{ loop.index0 * 20 + 2 }}" width="{{ bar.width }}" height="15" fill="{{ bar.colour }}"></rect>
<text x="{{ 144 + bar.width }}" y="{{ loop.index0 * 20 + 14 }}">{{ '{:,}'.format(bar.count) }}</text>
{% endfor %}
</svg>
{% endmacro %}
<h1>Mined records</h1>
<p>Format {{ stats.format }}; {{ '{:,}'.format(stats.rows.read) }} rows read, {{ '{:,}'.format(stats.rows.bad) }} of
 them left out as broken; {{ '{:,}'.format(stats.conversations) }} conversations.</p>
<table><tr><th>records</th><th>held out</th><th>training</th></tr>
{% for kind, counts in stats.records.items() %}
<tr><td>{{ kind }}</td><td>{{ '{:,}'.format(counts.test) }}</td><td>{{ '{:,}'.format(counts.train) }}</td></tr>
{% endfor %}
</table>
{% for note in stats.notes %}
<p>{{ note }}</p>
{% endfor %}
<h2>Signals per turn</h2>
{% for kind, bars in turns.items() %}
<h3>{{ kind }}</h3>
{{ chart(bars, kind ~ ' per user turn') }}
{% else %}
<p>None.</p>
{% endfor %}
<h2>Lengths of DSAT records</h2>
{% for title, bars in charts.items() %}
<h3>{{ title }}</h3>
{{ chart(bars, title) }}
{% else %}
<p>None.</p>
{% endfor %}
<h2>What was left out, and why</h2>
{% if stats.left_out.values() | map('length') | sum %}
<table><tr><th>at</th><th style="text-align:left">reason</th><th>count</th></tr>
{% for stage, reasons in stats.left_out.items() %}{% for reason, count in reasons.items() %}
<tr><td>{{ stage }}</td><td style="text-align:left">{{ reason }}</td><td>{{ '{:,}'.format(count) }}</td></tr>
{% endfor %}{% endfor %}
</table>
{% else %}
<p>Nothing.</p>
{% endif %}
<h2>Examples, drawn at random</h2>
{% for one in examples %}
<article><b>{{ one.id }}</b> <span class="role">{{ one.split }}</span>
{% if one.earlier %}
<p class="role">{{ one.earlier }} earlier messages</p>
{% endif %}
{% for message in one.prompt %}
<div class="said"><span class="role">{{ message.role }}</span>
{{ message.content }}</div>
{% endfor %}
<div class="said rejected"><span class="role">rejected reply</span>
{{ one.rejected }}</div>
<div class="said complaint"><span class="role">complaint</span>
<mark>{{ one.complaint }}</mark></div>
<details><summary>evidence</summary><pre>{{ one.evidence }}</pre></details>
</article>
{% else %}
<p>There is no DSAT record.</p>
{% endfor %}
</body></html>
"""
