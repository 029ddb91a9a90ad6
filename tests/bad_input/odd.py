"""Files that cannot lie in the repository as text: binary ones, large ones, and those that are no files."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Maker = Callable[[Path], Any]


def _directory(path: Path) -> None:
    path.mkdir()


def _pipe(path: Path) -> None:
    """Nobody writes to it: whoever opens it to read waits."""
    os.mkfifo(path)


def _endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    """Cannot be opened by anybody, root included."""
    path.symlink_to(path.name)


def _bytes(data: bytes) -> Maker:
    return lambda path: path.write_bytes(data)


def _json(value: Any) -> Maker:
    return lambda path: path.write_text(json.dumps(value), encoding="utf-8")


# --- safetensors ------------------------------------------------------------------------------------------------

_NORM = "model.norm.weight"


def _header(text: bytes, length: int | None = None, data: bytes = b"") -> Maker:
    return _bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def _tensors(change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]) -> Maker:
    """The file that is there already, with another header or other data."""

    def make(path: Path) -> None:
        data = path.with_name("model.safetensors.kept").read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header, rest = change(json.loads(data[8 : 8 + length]), data[8 + length :])
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + rest)

    return make


def _with(name: str, **changes: Any) -> Maker:
    return _tensors(lambda header, data: (header | {name: header[name] | changes}, data))


def _overlapping(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """One tensor lies where another one does."""
    first, second = [name for name, of in header.items() if name != "__metadata__" and of["data_offsets"][0] > 0][:2]
    same = {key: header[first][key] for key in ("shape", "data_offsets")}
    return header | {second: header[second] | same}, data


def _renamed(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    return {"other.weight" if name == _NORM else name: of for name, of in header.items()}, data


def _integers(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    return header | {_NORM: header[_NORM] | {"dtype": "I32"}}, data


def _kept(path: Path) -> None:
    path.write_bytes(path.with_name("model.safetensors.kept").read_bytes())


# --- npz --------------------------------------------------------------------------------------------------------


def _arrays(change: Callable[[dict[str, np.ndarray]], dict[str, Any]], pack: Any = np.savez) -> Maker:
    def make(path: Path) -> None:
        with np.load(path.with_name("ref_logps.kept.npz")) as kept:
            arrays = dict(kept)
        pack(path, **change(arrays))

    return make


def _pickled(path: Path) -> None:
    """Unpickling runs code: an array of objects must be refused unread."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("ids", "tokens", "ref_logps", "ref_last_logps"):
            buffer = io.BytesIO()
            np.save(buffer, np.array([Path("x")], dtype=object), allow_pickle=True)
            archive.writestr(f"{name}.npy", buffer.getvalue())


# --- logs -------------------------------------------------------------------------------------------------------

_TURNS = [
    {"role": "user", "content": "Say one."},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "That is wrong, I said one."},
]
_ROW = {"messages": _TURNS}
_LINE = json.dumps(_ROW).encode() + b"\n"


def _parquet(table: dict[str, Any], cut: int | None = None) -> Maker:
    def make(path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(table), path)
        if cut is not None:
            path.write_bytes(path.read_bytes()[:cut])

    return make


def _far_date(path: Path) -> None:
    """A time that Python has no date for, in a column that is read."""
    import pyarrow
    import pyarrow.parquet

    times = pyarrow.array([2**62 // 1000], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"messages": pyarrow.array([_TURNS]), "id": times}), path)


_PACKED = gzip.compress(_LINE * 50, mtime=0)

MAKERS: dict[str, Maker] = {
    # records
    "dsat/directory.jsonl": _directory,
    "dsat/pipe.jsonl": _pipe,
    "dsat/endless.jsonl": _endless,
    "dsat/loop.jsonl": _loop,
    "dsat/not_utf8.jsonl": _bytes(b'{"prompt": "caf\xe9"}\n'),
    "dsat/nul_bytes.jsonl": _bytes(b"\0" * 64 + b"\n"),
    "dsat/utf16.jsonl": _bytes('{"prompt": []}\n'.encode("utf-16")),
    "dsat/deep.jsonl": _bytes(b'{"prompt": ' + b"[" * 100_000 + b"\n"),
    "dsat/huge_integer.jsonl": _bytes(b'{"id": ' + b"9" * 5000 + b"}\n"),
    "pairs/carriage_returns.jsonl": _bytes(b'{"prompt": 1}\r{"prompt": 2}\r'),
    "pairs/gzip.jsonl": _bytes(_PACKED),
    "convert/pipe.jsonl": _pipe,
    # configs
    "config/directory.yaml": _directory,
    "config/pipe.yaml": _pipe,
    "config/endless.yaml": _endless,
    "config/not_utf8.yaml": _bytes(b"run_dir: caf\xe9\n"),
    "config/nul_byte.yaml": _bytes(b"run_dir: a\0b\n"),
    "config/deep.yaml": _bytes(b"run_dir: " + b"[" * 2_000 + b"\n"),
    "config/large.yaml": _bytes(b"# padding\n" * 200_000),
    "config/huge_integer.yaml": _bytes(b"run_dir: run\ntrain: {seed: " + b"9" * 5000 + b"}\n"),
    "rules/pipe.yaml": _pipe,
    "mining_config/endless.yaml": _endless,
    "handbook/pipe.yaml": _pipe,
    # model directories
    "model_config/directory": _directory,
    "model_config/pipe": _pipe,
    "model_config/endless": _endless,
    "model_config/deep.json": _bytes(b'{"a": ' * 50_000),
    "tokenizer/pipe": _pipe,
    "tokenizer/not_utf8.json": _bytes(b'{"version": "\xff"}'),
    "tokenizer/directory": _directory,
    "chat_template/not_utf8.jinja": _bytes(b"{{ messages }}\xff"),
    "chat_template/pipe": _pipe,
    "safetensors/good.safetensors": _kept,
    "safetensors/empty.safetensors": _bytes(b""),
    "safetensors/seven_bytes.safetensors": _bytes(b"1234567"),
    "safetensors/directory": _directory,
    "safetensors/pipe": _pipe,
    "safetensors/length_of_exabytes.safetensors": _header(b"{}", 2**63),
    "safetensors/length_of_all_ones.safetensors": _bytes(b"\xff" * 16),
    "safetensors/length_beyond_the_end.safetensors": _header(b"{}", 3),
    "safetensors/length_zero.safetensors": _header(b"", 0),
    "safetensors/header_is_text.safetensors": _header(b"hello, world"),
    "safetensors/header_is_an_array.safetensors": _header(b"[]"),
    "safetensors/header_not_utf8.safetensors": _header(b'{"\xff": 1}'),
    "safetensors/header_deep.safetensors": _header(b'{"a":' * 50_000),
    "safetensors/tensor_twice.safetensors": _header(
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
        b'"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        data=b"\0" * 4,
    ),
    "safetensors/entry_is_a_number.safetensors": _header(b'{"a": 1}'),
    "safetensors/no_dtype.safetensors": _header(b'{"a": {"shape": [1], "data_offsets": [0, 4]}}', data=b"\0" * 4),
    "safetensors/offsets_negative.safetensors": _with(_NORM, data_offsets=[-4, 60]),
    "safetensors/offsets_backwards.safetensors": _with(_NORM, data_offsets=[64, 0]),
    "safetensors/offsets_beyond_the_end.safetensors": _with(_NORM, data_offsets=[2**40, 2**40 + 64]),
    "safetensors/offsets_of_text.safetensors": _with(_NORM, data_offsets=["0", "64"]),
    "safetensors/offsets_overlap.safetensors": _tensors(_overlapping),
    "safetensors/shape_huge.safetensors": _with(_NORM, shape=[2**62, 2**62]),
    "safetensors/shape_other.safetensors": _with(_NORM, shape=[4, 4]),
    "safetensors/cut_off.safetensors": _tensors(lambda header, data: (header, data[:-1])),
    "safetensors/more_behind.safetensors": _tensors(lambda header, data: (header, data + b"\0" * 8)),
    "safetensors/name_unknown.safetensors": _tensors(_renamed),
    "safetensors/integers.safetensors": _tensors(_integers),
    "safetensors_index/pipe": _pipe,
    # a run
    "manifest/deep.json": _bytes(b"[" * 100_000),
    "manifest/directory": _directory,
    "completions/not_utf8.jsonl": _bytes(b'{"id": "d0", "text": "\xff"}\n'),
    "completions/directory": _directory,
    "ref_logps/good.npz": _arrays(lambda arrays: arrays),
    "ref_logps/empty.npz": _bytes(b""),
    "ref_logps/text.npz": _bytes(b"0.5 0.25\n"),
    "ref_logps/directory": _directory,
    "ref_logps/cut_off.npz": _arrays(
        lambda arrays: arrays, lambda path, **of: (np.savez(path, **of), path.write_bytes(path.read_bytes()[:300]))
    ),
    "ref_logps/pickled.npz": _pickled,
    "ref_logps/bomb.npz": _arrays(lambda arrays: arrays | {"ref_logps": np.zeros((1 << 20, 2))}, np.savez_compressed),
    "ref_logps/array_missing.npz": _arrays(lambda arrays: {"tokens": arrays["tokens"]}),
    "ref_logps/shape.npz": _arrays(lambda arrays: arrays | {"ref_logps": arrays["ref_logps"][:3]}),
    "ref_logps/text_array.npz": _arrays(lambda arrays: arrays | {"ref_logps": arrays["ref_logps"].astype("U8")}),
    "checkpoint/directory": _directory,
    "checkpoint/empty": _bytes(b""),
    "checkpoint/binary": _bytes(bytes(range(256))),
    # evaluation
    "prompts/pipe.jsonl": _pipe,
    "prompts/endless.jsonl": _endless,
    "prompts/directory.jsonl": _directory,
    "prompts/not_utf8.jsonl": _bytes(b'[{"prompt": "\xff"}]'),
    "prompts/deep.jsonl": _bytes(b"[" * 100_000),
    "outputs/deep.json": _bytes(b'[{"output": ' + b"[" * 100_000),
    "wildbench_rows/deep.json": _bytes(b"[" * 100_000),
    "wildbench_template/not_utf8.md": _bytes(b"{$history}{$user_query}{$model_output}{$checklist}\xff"),
    "verdicts/not_utf8.jsonl": _bytes(b'{"key": "\xff"}\n'),
    "verdicts/directory": _directory,
    "verdicts/pipe": _pipe,
    # logs
    "log_jsonl/pipe.jsonl": _pipe,
    "log_jsonl/endless.jsonl": _endless,
    "log_jsonl/loop.jsonl": _loop,
    "log_jsonl/not_utf8.jsonl": _bytes(b'{"messages": "\xff"}\n'),
    "log_jsonl/nul_bytes.jsonl": _bytes(b"\0" * 100),
    "log_jsonl/deep.jsonl": _bytes(b'{"messages": ' + b"[" * 100_000 + b"\n"),
    "log_jsonl/utf16.jsonl": _bytes(_LINE.decode().encode("utf-16")),
    "log_json/deep.json": _bytes(b"[" * 100_000),
    "log_json/not_utf8.json": _bytes(b'[{"messages": "\xff"}]'),
    "log_csv/nul_byte.csv": _bytes(b'conversation\n"a\0b"\n'),
    "log_csv/not_utf8.csv": _bytes(b"conversation\ncaf\xe9\n"),
    "log_gz/good.jsonl.gz": _bytes(_PACKED),
    "log_gz/cut_off.jsonl.gz": _bytes(_PACKED[:-20]),
    "log_gz/not_packed.jsonl.gz": _bytes(_LINE),
    "log_gz/empty.jsonl.gz": _bytes(b""),
    "log_gz/broken_inside.jsonl.gz": _bytes(_PACKED[:40] + b"\xff\xff\xff\xff" + _PACKED[44:]),
    "log_gz/wrong_checksum.jsonl.gz": _bytes(_PACKED[:-8] + b"\0\0\0\0" + _PACKED[-4:]),
    "log_gz/pipe.jsonl.gz": _pipe,
    "log_parquet/good.parquet": _parquet({"messages": [_TURNS]}),
    "log_parquet/empty.parquet": _bytes(b""),
    "log_parquet/text.parquet": _bytes(_LINE),
    "log_parquet/cut_off.parquet": _parquet({"messages": [_TURNS] * 100}, cut=200),
    "log_parquet/footer_length.parquet": _bytes(b"PAR1" + b"\0" * 8 + b"\xff\xff\xff\x7fPAR1"),
    "log_parquet/no_column.parquet": _parquet({"text": ["a"]}),
    "log_parquet/column_of_numbers.parquet": _parquet({"messages": [1, 2]}),
    "log_parquet/no_rows.parquet": _parquet({"messages": []}),
    "log_parquet/far_date.parquet": _far_date,
    "log_parquet/pipe.parquet": _pipe,
    "log_wildfeedback/endless.jsonl": _endless,
    "report_json/deep.json": _bytes(b"[" * 100_000),
    "eval_json/deep.json": _bytes(b"[" * 100_000),
    "judge_answer/not_utf8.http": _bytes(b'{"choices": "\xff"}'),
    "judge_answer/deep.http": _bytes(b"[" * 100_000),
    "disk_dataset/directory": _directory,
}
