"""Rate and memory of `drift mine`, as one line of JSON.

    python scripts/bench_mine.py FILE [--format wildfeedback] [--detector rules] [--runs 3] [-- further options]

Each run is a process of its own, from its start to its end, into a fresh directory; `peak_rss_gb` is the most it had
resident (10**9 bytes), `mb_per_s` counts the bytes of the file (10**6), `cpu_seconds` is that of all its threads. The
best run and all of them are printed, and whether every run left the same bytes. Files: `make_wildfeedback.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> int:
    args = parse_args()
    runs = [run_once(args) for _ in range(args.runs)]
    best = min(runs, key=lambda run: run["seconds"])
    line = {
        "file": args.file.name,
        "mb": round(args.file.stat().st_size / 1e6, 1),
        "format": args.format,
        "mb_per_s": best["mb_per_s"],
        "peak_rss_gb": max(run["peak_rss_gb"] for run in runs),
        "same_bytes": len({run["sha256"] for run in runs}) == 1,
        "cores": os.cpu_count(),
        **{key: best[key] for key in ("rows", "conversations", "records")},
        "runs": [{key: run[key] for key in ("seconds", "cpu_seconds", "mb_per_s", "peak_rss_gb")} for run in runs],
    }
    print(json.dumps(line))
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--format", default="wildfeedback")
    parser.add_argument("--detector")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("more", nargs="*", help="further options of drift mine, behind --")
    return parser.parse_args()


def run_once(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "mined"
        words = [str(args.file), "--format", args.format, "--out", str(out), *args.more]
        words += ["--detector", args.detector] if args.detector else []
        start = time.monotonic()
        # Its progress lines go to standard error, so that standard output holds the one line alone.
        process = subprocess.Popen([sys.executable, "-m", "drift_jax", "mine", *words], stdout=sys.stderr)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
        if status:
            raise SystemExit(f"drift mine ended with status {status}")
        stats = json.loads((out / "stats.json").read_text(encoding="utf-8"))
        digest = hashlib.sha256()
        for path in sorted(path for path in out.iterdir() if not path.name.startswith(".")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return {
        "seconds": round(seconds, 2),
        "mb_per_s": round(args.file.stat().st_size / 1e6 / seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_gb": round(usage.ru_maxrss * 1024 / 1e9, 3),
        "sha256": digest.hexdigest(),
        "rows": stats["rows"]["read"],
        "conversations": stats["conversations"],
        "records": {kind: sum(counts.values()) for kind, counts in stats["records"].items()},
    }


if __name__ == "__main__":
    sys.exit(main())
