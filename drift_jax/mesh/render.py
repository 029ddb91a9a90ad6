"""A mesh report on a terminal: tables and drawings that fit into its width, with and without colour."""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from drift_jax.mesh.drawing import Drawing, lay_out
from drift_jax.mesh.report import MeshReport
from drift_jax.mesh.rows import ArrayRow, Axes, HostRow

# What a dim of the table of rules is.
DIMS = {
    "batch": "rows of a micro-batch",
    "length": "tokens of a row",
    "hidden": "width of activations",
    "embed": "the same, of weights",
    "heads": "query heads",
    "kv_heads": "key and value heads",
    "head_dim": "width of a head",
    "mlp": "width of the MLP",
    "vocab": "words, where tables lie",
    "layers": "stacked layers",
    "rows": "rows, where tables meet tokens",
    "embed_of_batch": "embed, beside batch",
    "vocab_slice": "words, where tables meet tokens",
}

_WHOLE = "-"
_TOKENS = "tokens"  # of a row, where no rule splits them
_CHANGED, _ODD, _AXES, _QUIET = "bold magenta", "yellow", "cyan", "dim"
_MOST_HOSTS = 8
_MANY_LINES = 16  # of a drawing: cells are narrower then


def print_report(report: MeshReport, console: Console) -> None:
    """Everything, in the order in which questions come up."""
    console.print(_head(report))
    _section(console, "Rules", "dim -> mesh axes")
    console.print(_rules_table(report))
    if any(row.changed for row in report.rules):
        console.print("* by mesh.rules of the config; in brackets the strategy's own", style=_CHANGED, highlight=False)
    _section(console, "Parameters", "size/axes of each dim; bytes on a device")
    _print_arrays(console, report.parameters, "parameter")
    _section(console, "Bytes", "of one copy, on a device, on all devices")
    console.print(_totals_table(report))
    _section(console, "Activations", "size/axes of each dim; ? is known to the data only")
    console.print(_batch_text(report))
    _print_arrays(console, report.activations, "activation")
    for drawing in report.drawings:
        _print_drawing(console, drawing, {axis: report.mesh[axis] for axis in report.order})
    for note in report.notes:
        _remark(console, "note", _ODD, note)
    for problem in report.problems:
        console.print(
            Text("\ndrift run would refuse this: ", style="bold red").append(problem, style="not bold default")
        )


def _remark(console: Console, kind: str, style: str, words: str) -> None:
    console.print(Text(f"\n{kind}: ", style=style).append(words, style="not bold default"))


def _section(console: Console, title: str, of: str) -> None:
    console.print(Text(f"\n{title}", style="bold").append(f"  {of}", style=f"not bold {_QUIET}"))


def _table(*columns: str, right: Iterable[str] = (), wrapped: str = "") -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column != wrapped)
    return table


# --- head -------------------------------------------------------------------------------------------------


def _head(report: MeshReport) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("mesh", " x ".join(f"{axis} {size}" for axis, size in report.mesh.items()))
    split = [axis for axis in report.order if report.mesh[axis] > 1]
    if len(split) > 1:
        table.add_row("", f"neighbours along {split[-1]}, farthest apart along {split[0]}")
    if report.planned:
        table.add_row("devices", f"{report.devices}, planned for: they are not here")
    else:
        table.add_row("devices", f"{report.devices} x {escape(report.device_kind)} ({report.platform})")
        for line in _host_lines(report.hosts):
            table.add_row("", line)
    if report.across_hosts:
        table.add_row("", f"between hosts goes what is sent along {', '.join(report.across_hosts)}")
    table.add_row("strategy", report.strategy + ("" if report.chosen else " (auto: the axes with several devices)"))
    table.add_row("model", f"{escape(report.model)}, {report.num_parameters:,} parameters")
    return table


def _host_lines(hosts: Sequence[HostRow]) -> Iterator[str]:
    shown = hosts if len(hosts) <= _MOST_HOSTS else hosts[: _MOST_HOSTS - 1]
    for host in shown:
        yield f"process {host.process}: devices {join_ids(host.devices)}"
    if len(shown) < len(hosts):
        yield f"... and {len(hosts) - len(shown)} more, {len(hosts[-1].devices)} devices on the last"


def join_ids(ids: Sequence[int]) -> str:
    """`0-3, 8` for 0, 1, 2, 3, 8."""
    runs: list[list[int]] = []
    for number in sorted(ids):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


# --- tables -----------------------------------------------------------------------------------------------


def _rules_table(report: MeshReport) -> Table:
    table = _table("dim", "split over", "ways", "what it is", right=("ways",), wrapped="what it is")
    for row in report.rules:
        axes = Text(_join_axes(row.axes), style=_AXES if row.axes else _QUIET)
        if row.changed:
            axes.append(f" [{_join_axes(row.table)}]", style=_QUIET)
        name = Text(row.dim + "*" * row.changed, style=_CHANGED if row.changed else "")
        table.add_row(name, axes, str(row.ways), Text(DIMS[row.dim], style=_QUIET))
    return table


def _join_axes(axes: Axes) -> str:
    return "+".join(axes) or _WHOLE


def _print_arrays(console: Console, rows: Sequence[ArrayRow], what: str) -> None:
    """With shapes, dims and specs of their own where the width allows it, else in one column."""
    groups: dict[str, list[ArrayRow]] = {}
    for row in rows:
        groups.setdefault(row.name.rpartition(".")[0], []).append(row)
    table = _wide_arrays(groups, what)
    if Measurement.get(console, console.options.update(max_width=10_000), table).maximum > console.width:
        table = _narrow_arrays(groups, what, console.width)
    console.print(table)
    for reason in dict.fromkeys(reason for row in rows for reason in row.whole.values()):
        console.print(f"* {reason}: it is whole on each of these devices", style=_ODD, highlight=False)


def _wide_arrays(groups: Mapping[str, Sequence[ArrayRow]], what: str) -> Table:
    every = [row for rows in groups.values() for row in rows]
    table = _table(what, "shape", "dims", "PartitionSpec", *_bytes_column(every), right=_bytes_column(every))
    for group, rows in groups.items():
        if group:
            table.add_row(Text(group, style="bold"))
        for row in rows:
            table.add_row(
                _name_text(row),
                "x".join(_size(size) for size in row.shape),
                " ".join(dim or _TOKENS for dim in row.dims),
                Text(spec_text(row.spec), style=_AXES).append(" *" * bool(row.whole), style=_ODD),
                *_bytes_cell(row),
            )
    return table


def _narrow_arrays(groups: Mapping[str, Sequence[ArrayRow]], what: str, width: int) -> Table:
    """What all of a group are stacked along stands in its heading."""
    every = [row for rows in groups.values() for row in rows]
    table = _table(what, "size/axes of each dim", *_bytes_column(every), right=_bytes_column(every))
    room = width - max(len(_name_text(row)) for row in every) - 2 - 13 * len(_bytes_column(every))
    for group, rows in groups.items():
        dims = [[_dim_text(row, i) for i in range(len(row.dims))] for row in rows]
        if group:
            stacked = len({texts[0].plain for texts in dims}) == 1 and min(map(len, dims)) > 1
            table.add_row(Text(group, style="bold"), Text("stacked along ").append(dims[0][0]) if stacked else "")
            dims = [texts[1:] for texts in dims] if stacked else dims
        for row, texts in zip(rows, dims, strict=True):
            table.add_row(_name_text(row), _fold(texts, room), *_bytes_cell(row))
    return table


def _name_text(row: ArrayRow) -> Text:
    """Without the group, which is the heading above."""
    group, _, name = row.name.rpartition(".")
    return Text("  " * bool(group) + name)


def _bytes_column(rows: Sequence[ArrayRow]) -> tuple[str, ...]:
    return () if rows[0].bytes_per_device is None else ("on a device",)


def _bytes_cell(row: ArrayRow) -> tuple[str, ...]:
    return () if row.bytes_per_device is None else (format_bytes(row.bytes_per_device),)


def spec_text(spec: Sequence[Axes]) -> str:
    """As JAX writes it: `P(None, 'fsdp', ('tensor', 'fsdp'))`."""
    entries = ["None" if not axes else repr(axes[0]) if len(axes) == 1 else repr(tuple(axes)) for axes in spec]
    return f"P({', '.join(entries)})"


def _size(size: int | None) -> str:
    return "?" if size is None else str(size)


def _dim_text(row: ArrayRow, i: int) -> Text:
    dim, axes = row.dims[i], row.spec[i]
    text = Text(f"{dim or _TOKENS} {_size(row.shape[i])}")
    if axes:
        text.append(f"/{'+'.join(axes)}", style=_AXES)
    if dim in row.whole:
        text.append("*", style=_ODD)
    return text


def _fold(words: Sequence[Text], room: int) -> Text:
    """Joined, with a new line before what has no room; never inside of a word."""
    text, used = Text(), 0
    for word in words:
        gap = "" if not used else "  " if used + 2 + len(word) <= room else "\n"
        used = len(word) + (0 if gap == "\n" else used + len(gap))
        text.append(gap).append(word)
    return text


def _totals_table(report: MeshReport) -> Table:
    numbers = ("one copy", "on a device", "on all", "copies")
    table = _table("", "dtype", *numbers, right=numbers)
    for row in report.totals:
        every = row.bytes_per_device * report.devices
        cells = (format_bytes(row.bytes), format_bytes(row.bytes_per_device), format_bytes(every))
        table.add_row(row.what, row.dtype, *cells, f"{every / row.bytes:.3g}", style="bold" * (not row.dtype))
    return table


def format_bytes(count: int) -> str:
    """`1.5 MiB`: in the largest unit of which there is one."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    digits = 0 if unit == "B" or size >= 100 else 1 if size >= 10 else 2
    return f"{size:.{digits}f} {unit}"


def _batch_text(report: MeshReport) -> Text:
    rows, tokens = report.batch.rows_split, report.batch.tokens_split
    pairs = report.batch.pairs / rows
    whose = f"{report.batch.pairs} pairs of a micro-batch over {rows} part{'s' * (rows > 1)} of its rows"
    share = "whole rows" if tokens == 1 else f"1/{tokens} of the tokens of each of its rows"
    return Text(f"{whose}: {pairs:.4g} pair{'s' * (pairs != 1)} each; a device has {share}")


# --- drawings ---------------------------------------------------------------------------------------------


def _print_drawing(console: Console, drawing: Drawing, sizes: dict[str, int]) -> None:
    _section(console, drawing.name, f"a cell per device; {drawing.legend}")
    longest = max(map(len, drawing.labels))
    for cell in (longest + 2, longest + 1):
        lines = lay_out(sizes, cell, console.width)
        if len(lines) <= _MANY_LINES:
            break
    margin = max(len(line.label) for line in lines)
    margin += margin > 0
    for line in lines:
        text = Text(line.label.ljust(margin), style=_QUIET, no_wrap=True, end="")
        for i in range(line.first, line.last + 1):
            style = f"not dim black on {_colour(drawing.parts[i], drawing.counts)}"
            text.append(drawing.labels[i].rjust(longest).center(cell), style=style)
        console.print(text, soft_wrap=True)


def _colour(part: tuple[int, ...], counts: tuple[int, ...]) -> str:
    """A hue by the first coordinate, a lightness by the others; dark enough to be seen, light enough for black text."""
    first, count = (part[0], counts[0]) if part else (0, 1)
    rest, parts = 0, 1
    for place, size in zip(part[1:], counts[1:], strict=True):
        rest, parts = rest * size + place, parts * size
    light = 0.72 if parts == 1 else 0.86 - 0.28 * rest / (parts - 1)
    # Less than the whole circle, so that the first and the last part do not look alike.
    red, green, blue = colorsys.hls_to_rgb(0.55 + 0.85 * first / count, light, 0.65)
    return f"rgb({round(255 * red)},{round(255 * green)},{round(255 * blue)})"
