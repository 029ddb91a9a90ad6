"""A virtual environment for each peer, made at its first use in `.venv-peers/` and remembered by a stamp."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from handover import say

# Tunix names no version of jax: it gets ours. The others are what pip found for it, after a long search.
REQUIREMENTS = {
    "trl": ["trl==1.16.0", "torch==2.13.0"],
    "tunix": ["google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.6", "transformers==5.12.1"],
}
_SHOWN = ("Downloading", "Installing collected", "Successfully", "ERROR", "error:")


class PeerError(Exception):
    """A peer cannot be installed, or does not do its part."""


def peer_python(peer: str, folder: Path) -> Path:
    """The Python of the peer's environment below `folder`, which is made when it is not there or of other versions.

    Raises:
      PeerError: pip fails; what it said is in `folder`.
    """
    wanted = requirements(peer)
    home = folder / peer
    python = home / "bin" / "python"
    stamp = home / f".installed-{hashlib.sha256(' '.join([sys.version, *wanted]).encode()).hexdigest()[:12]}"
    if stamp.exists():
        return python
    say(f"Installing {', '.join(wanted)} into {home}, once")
    shutil.rmtree(home, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    install(python, wanted, home / "pip.log")
    stamp.touch()
    return python


def requirements(peer: str) -> list[str]:
    """With the CUDA plugin of jax where there is an NVIDIA GPU; torch brings its own."""
    cuda = shutil.which("nvidia-smi") is not None
    return [name.replace("jax==", "jax[cuda12]==") if cuda else name for name in REQUIREMENTS[peer]]


def install(python: Path, wanted: list[str], log: Path) -> None:
    """pip, of whose words only the large steps are shown."""
    command = [str(python), "-m", "pip", "install", "--progress-bar", "off", "--log", str(log), *wanted]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        assert pip.stdout
        for line in pip.stdout:
            if line.strip().startswith(_SHOWN):
                say(f"  {line.strip()[:110]}")
    if pip.returncode:
        raise PeerError(f"pip could not install {', '.join(wanted)}; all it said is in {log}.")
