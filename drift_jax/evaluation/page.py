"""A report as one HTML file that loads nothing: tables, a figure, notes. All text is escaped."""

from __future__ import annotations

from jinja2 import Environment
from markupsafe import Markup

from drift_jax.evaluation.report import Report

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; }
th, td { padding: 0.25rem 0.8rem; text-align: right; border-bottom: 1px solid #ddd; overflow-wrap: anywhere; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; }
svg { max-width: 100%; height: auto; }
li { color: #555; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ report.title }}</h1>
{% if figure %}<figure>{{ figure }}</figure>{% endif %}
{% for section in report.sections %}
<h2>{{ section.title }}</h2>
<div class="scroll"><table>
<tr>{% for column in section.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in section.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}
<ul>{% for note in report.notes %}<li>{{ note }}</li>{% endfor %}</ul>
</body>
</html>
"""


def render_page(report: Report, svg: str | None) -> str:
    """Args: `svg` is an element that `figures.save` made, whose labels are escaped."""
    figure = Markup(svg) if svg else None  # noqa: S704  (ours, not text of a user)
    return Environment(autoescape=True).from_string(_PAGE).render(report=report, figure=figure)
