"""The plan as tables for a terminal, and as a page with bar charts. Everything on the page is in the one file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import Environment
from rich import box
from rich.console import Console
from rich.table import Table

from drift_jax.plan.rows import GIB, Parts, Row

_COLOURS = ("#4c78a8", "#72b7b2", "#f58518", "#54a24b", "#b9b9b9")  # of `Parts`, in its order
_BAR, _GAP, _LEFT, _WIDTH = 20, 10, 250, 520
_ESTIMATE = "time is an estimate: the compiler's cycles, kernels by their FLOPs, collectives by their bytes"


def label(row: Row) -> str:
    mesh = " ".join(f"{axis}={size}" for axis, size in row.mesh.items() if size != 1) or "1 device"
    return f"{mesh} acc={row.accumulation_steps} {row.remat}"


def print_plan(rows: Sequence[Row], console: Console, title: str) -> None:
    """What fits and what it costs, what the memory is made of, and what the devices send."""
    console.print(_cost_table(rows, title))
    console.print(_memory_table(rows))
    if any(row.collectives for row in rows):
        console.print(_traffic_table(rows))
    for about in dict.fromkeys(row.about for row in rows if row.about):
        console.print(about, highlight=False, soft_wrap=True, markup=False)
    console.print(f"{_ESTIMATE}; bound: the pairs' FLOPs at the chips' peak.", highlight=False, soft_wrap=True)
    for row in rows:
        if row.note:
            console.print(f"{label(row)}: {row.note}", highlight=False, soft_wrap=True, markup=False)


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cost_table(rows: Sequence[Row], title: str) -> Table:
    table = _table(title, ("mesh", "fits"), ("GiB/chip", "of", "s/update", "bound", "tokens/s"))
    for row in rows:
        seconds = row.estimated_step_s
        rate = f"{row.tokens_per_step / seconds:,.0f}" if seconds else "-"
        cells = (*map(_cell, (row.hbm_gib_per_chip, row.limit_gib)), *map(_time, (seconds, row.bound_step_s)))
        table.add_row(label(row), "yes" if row.fits else "no", *cells, rate)
    return table


def _memory_table(rows: Sequence[Row]) -> Table:
    names = ("train", "param", "optim", "grad", "activ", "temp", "ref", "sampl")
    table = _table("GiB per chip: the train step and its parts, the reference pass, the sampler", ("mesh",), names)
    for row in rows:
        parts = row.parts or (None,) * len(Parts._fields)
        others = (row.programs.get("reference"), row.programs.get("sampler"))
        table.add_row(label(row), *map(_cell, (row.programs.get("train"), *parts, *others)))
    return table


def _traffic_table(rows: Sequence[Row]) -> Table:
    table = _table("collectives of an update, per device", ("mesh", "kind", "axis"), ("count", "GiB"))
    for row in rows:
        for i, sent in enumerate(row.collectives):
            name = label(row) if i == 0 else ""
            table.add_row(name, sent.kind, sent.axis, f"{sent.count:,.0f}", f"{sent.bytes / GIB:,.3f}")
    return table


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g}"


# --- the page ------------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A coloured piece of a bar, in pixels."""

    x: float
    width: float
    colour: str
    title: str


class _Bar(NamedTuple):
    y: int
    label: str
    pieces: list[_Piece]
    end: float
    text: str


def render_page(rows: Sequence[Row], title: str, why: str = "") -> str:
    """A self-contained HTML page: memory per chip by part against the limit, estimated time against its bound."""
    return (
        Environment(autoescape=True)
        .from_string(_PAGE)
        .render(
            title=title,
            why=why,
            memory=_memory_chart(rows),
            time=_time_chart(rows),
            legend=list(zip(Parts._fields, _COLOURS, strict=True)),
            rows=[(label(row), row) for row in rows],
            gib=GIB,
            left=_LEFT,
            bar=_BAR,
            full=_LEFT + _WIDTH + 140,
            estimate=_ESTIMATE,
            abouts=list(dict.fromkeys(row.about for row in rows if row.about)),
        )
    )


def _memory_chart(rows: Sequence[Row]) -> dict[str, Any]:
    limits = [row.limit_gib for row in rows if row.limit_gib]
    most = max([row.hbm_gib_per_chip or 0.0 for row in rows] + limits, default=1.0) or 1.0
    scale = _WIDTH / (1.05 * most)
    bars = []
    for i, row in enumerate(rows):
        pieces, x = [], float(_LEFT)
        for name, colour, size in zip(Parts._fields, _COLOURS, row.parts or (), strict=False):
            pieces.append(_Piece(x, size * scale, colour, f"{name}: {size:.2f} GiB"))
            x += size * scale
        if row.hbm_gib_per_chip and not pieces:
            pieces = [_Piece(x, row.hbm_gib_per_chip * scale, "#e45756", row.note)]
            x += row.hbm_gib_per_chip * scale
        text = f"{_cell(row.hbm_gib_per_chip)} GiB" + ("" if row.fits else ", does not fit")
        bars.append(_Bar(_GAP + i * (_BAR + _GAP), label(row), pieces, x, text))
    limit = _LEFT + limits[0] * scale if limits else None
    return {"bars": bars, "height": _height(rows), "limit": limit, "limit_gib": limits[0] if limits else None}


def _time_chart(rows: Sequence[Row]) -> dict[str, Any]:
    most = max([row.estimated_step_s or row.bound_step_s or 0.0 for row in rows], default=1.0) or 1.0
    scale = _WIDTH / (1.05 * most)
    bars = []
    for i, row in enumerate(rows):
        pieces, x = [], float(_LEFT)
        if row.estimated_step_s and row.bound_step_s:
            over = max(0.0, row.estimated_step_s - row.bound_step_s)
            pieces = [
                _Piece(x, row.bound_step_s * scale, _COLOURS[0], f"bound: {row.bound_step_s:.2f} s"),
                _Piece(x + row.bound_step_s * scale, over * scale, _COLOURS[4], f"over it: {over:.2f} s"),
            ]
            x += max(row.estimated_step_s, row.bound_step_s) * scale
        text = f"{_time(row.estimated_step_s)} s (bound {_time(row.bound_step_s)})"
        bars.append(_Bar(_GAP + i * (_BAR + _GAP), label(row), pieces, x, text))
    return {"bars": bars, "height": _height(rows), "limit": None}


def _height(rows: Sequence[Row]) -> int:
    return 2 * _GAP + len(rows) * (_BAR + _GAP)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body{font:14px system-ui,sans-serif;margin:2em;max-width:70em;color:#222;background:#fff}
text{font:12px system-ui,sans-serif;fill:#222}
table{border-collapse:collapse}
td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}
.key{display:inline-block;width:.9em;height:.9em;margin:0 .3em 0 1em;vertical-align:-.1em}
</style></head><body>
{% macro chart(it, what) -%}
<svg role="img" aria-label="{{ what }}" width="{{ full }}" height="{{ it.height }}">
{% for b in it.bars %}<text x="{{ left - 8 }}" y="{{ b.y + 14 }}" text-anchor="end">{{ b.label }}</text>
{% for p in b.pieces %}<rect x="{{ '%.1f' % p.x }}" y="{{ b.y }}" width="{{ '%.1f' % p.width }}" height="{{ bar }}"
 fill="{{ p.colour }}"><title>{{ p.title }}</title></rect>
{% endfor %}<text x="{{ '%.1f' % (b.end + 6) }}" y="{{ b.y + 14 }}">{{ b.text }}</text>
{% endfor %}{% if it.limit %}<line x1="{{ '%.1f' % it.limit }}" x2="{{ '%.1f' % it.limit }}" y1="0"
 y2="{{ it.height }}" stroke="#d62728" stroke-width="2" stroke-dasharray="4 3"/>
{% endif %}</svg>
{%- endmacro %}
<h1>{{ title }}</h1>
{% if why %}<p>{{ why }}</p>{% endif %}
<h2>Memory per chip of the train step</h2>
<p>{% for name, colour in legend %}<span class="key" style="background:{{ colour }}"></span>{{ name }}{% endfor %}
{% if memory.limit_gib %}<span class="key" style="background:#d62728"></span>limit {{ '%.2f' % memory.limit_gib }} GiB
{% endif %}</p>
{{ chart(memory, "memory per chip") }}
<h2>Time of an update</h2>
<p>{{ estimate }}. The dark part is the lower bound: the FLOPs that the pairs need, at the chips' peak.</p>
{{ chart(time, "time of an update") }}
<h2>Collectives of an update, per device</h2>
<table><tr><th>mesh</th><th>kind</th><th>axis</th><th>count</th><th>GiB</th></tr>
{% for name, row in rows %}{% for sent in row.collectives %}<tr><td>{{ name }}</td><td>{{ sent.kind }}</td>
<td>{{ sent.axis }}</td><td>{{ '%.0f' % sent.count }}</td><td>{{ '%.3f' % (sent.bytes / gib) }}</td></tr>
{% endfor %}{% endfor %}</table>
<h2>Notes</h2>
<ul>{% for about in abouts %}<li>{{ about }}</li>{% endfor %}
{% for name, row in rows %}{% if row.note %}<li>{{ name }}: {{ row.note }}</li>{% endif %}{% endfor %}</ul>
</body></html>
"""
