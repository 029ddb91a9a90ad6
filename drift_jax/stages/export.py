"""From a checkpoint to a Hugging Face directory."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import jax
from rich.console import Console

from drift_jax.checkpoint import Checkpointer
from drift_jax.config import MeshConfig, RunConfig
from drift_jax.distributed import on_each, on_main
from drift_jax.errors import StageError
from drift_jax.models.hf import load_qwen_config
from drift_jax.models.hf_export import check_replaceable, save_hf
from drift_jax.models.qwen import abstract_params, declare_qwen
from drift_jax.sharding import build_layout
from drift_jax.stages.inputs import Summary

_FEW_CHANGED = 0.001  # of the weights: a policy that is all but the one it started from
_CHECKPOINT_FILE = "_CHECKPOINT_METADATA"  # what Orbax writes into each


def export_stage(config: RunConfig, checkpoints: Path, source_dir: Path, out_dir: Path, console: Console) -> Summary:
    """The newest checkpoint as a Hugging Face directory; config and tokenizer files come from `source_dir`."""
    layout = build_layout(config.mesh)
    _, declared = declare_qwen(load_qwen_config(source_dir))
    on_each(lambda: _check_directory(checkpoints))
    on_main(lambda: check_replaceable(out_dir))  # before what takes long
    with Checkpointer(checkpoints, config.checkpoint.keep) as checkpointer:
        step = checkpointer.newest_whole(partial(console.print, style="yellow", highlight=False, soft_wrap=True))
        if step is None:
            raise StageError(f"{checkpoints} holds no whole checkpoint. Run the training stage first.")
        params = checkpointer.restore(step, {"params": abstract_params(declared, layout)})["params"]
    console.print(f"writing {out_dir} ({config.export.dtype})", highlight=False, soft_wrap=True, markup=False)
    changed = save_hf(params, source_dir, out_dir, config.export.dtype, config.export.max_shard_gib)
    size = on_main(lambda: sum(f.stat().st_size for f in out_dir.glob("*.safetensors")))
    summary = {"step": step, "bytes": size, "path": str(out_dir)}
    if changed is None:
        return summary
    words = f"{changed:.2%} of its weights differ from those of {source_dir}"
    few = changed < _FEW_CHANGED and config.export.dtype != "float32"
    if few:
        words = f"warning: only {words}: export.dtype {config.export.dtype} rounds most of what was learnt away. Set "
        words += "export.dtype=float32, or train longer or at a higher train.learning_rate."
    console.print(words, style="yellow" if few else None, highlight=False, soft_wrap=True, markup=False)
    return summary | {"weights_changed": changed}


def mesh_for_export(source_dir: Path) -> MeshConfig:
    """As many devices along `fsdp` as the model's width divides over, whatever mesh has trained; for `drift export`."""
    devices, width = jax.device_count(), load_qwen_config(source_dir).embed
    fsdp = max(n for n in range(1, devices + 1) if devices % n == width % n == 0)
    return MeshConfig(data=devices // fsdp, fsdp=fsdp)


def _check_directory(checkpoints: Path) -> None:
    if not checkpoints.is_dir():
        raise StageError(
            f"no checkpoints at {checkpoints}. Give the checkpoints directory of a training stage, on storage that "
            "every host sees."
        )
    if not _holds_steps(checkpoints) and (near := _near(checkpoints)):
        raise StageError(
            f"{checkpoints} is no checkpoints directory of a training stage. Give {' or '.join(map(str, near))}."
        )


def _near(directory: Path) -> list[Path]:
    """Where the checkpoints are that a folder of a run, of a stage or beside them, or one of them, stands for."""
    if (directory / _CHECKPOINT_FILE).is_file():
        return [directory.parent]
    around = (directory / "checkpoints", directory.parent / "checkpoints", *sorted(directory.glob("*/checkpoints")))
    return [place for place in around if _holds_steps(place)]


def _holds_steps(directory: Path) -> bool:
    return any(path.name.isdigit() for path in directory.glob("*") if path.is_dir())
