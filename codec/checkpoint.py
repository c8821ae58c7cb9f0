"""Checkpoints: folders of safetensors, JSON and YAML, renamed into place whole. No pickle.

    runs/NAME/checkpoints/latest           text file: name of the newest checkpoint
    runs/NAME/checkpoints/best             text file: name of the best one
    runs/NAME/checkpoints/step_00001000/   model.safetensors, other GROUP.safetensors, config.yaml, state.json

`ema.safetensors`, where a run keeps averaged weights, holds the codec's parameters by the names of model.safetensors.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from codec.config import Config, phase_at, phase_config
from codec.files import write_atomically

PICKLE_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin", ".pkl", ".th", ".tar"}
ZIP_START = b"PK\x03\x04"  # torch.save's archive, whatever it is called
REQUIRED_FILES = ("model.safetensors", "config.yaml", "state.json")
TEMPORARY = ".tmp_"


def save_checkpoint(
    run_dir: str | Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict,
    config_yaml: str,
    *,
    best: bool,
    keep_last: int,
) -> Path:
    """Write a checkpoint so that a kill at any moment leaves this one whole or the one before it.

    Args:
        run_dir: folder of the run; `checkpoints/` is made in it.
        step: generator updates done; names the folder. A checkpoint of the same step is replaced.
        tensors: group -> name -> tensor; each group becomes GROUP.safetensors. "model" is required.
        state: anything JSON holds; floats come back exactly.
        config_yaml: the resolved config, as text.
        best: also point `best` here.
        keep_last: number of newest checkpoints to keep besides the best one, at least 1.
    Returns:
        The checkpoint's folder.
    """
    assert "model" in tensors and keep_last >= 1
    folder = Path(run_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)
    final = folder / f"step_{step:08d}"
    temporary = folder / f"{TEMPORARY}{final.name}"
    temporary.mkdir()
    for group, named in tensors.items():
        _save_tensors(temporary / f"{group}.safetensors", named)
    write_atomically(temporary / "config.yaml", config_yaml)
    write_atomically(temporary / "state.json", json.dumps(state, indent=1))
    _fsync(temporary)
    if final.exists():
        os.rename(final, folder / f"{TEMPORARY}replaced_{final.name}")
    os.rename(temporary, final)
    write_atomically(folder / "latest", final.name + "\n")
    if best:
        write_atomically(folder / "best", final.name + "\n")
    _fsync(folder)
    _remove_old(folder, keep_last)
    return final


def find_checkpoint(path: str | Path, which: str = "latest") -> Path:
    """The checkpoint folder that a path means.

    Args:
        path: a run folder, its `checkpoints` folder, or one checkpoint's folder.
        which: "latest" or "best"; not used when `path` is itself a checkpoint. Where the latest one has been
            removed, the newest complete one stands in for it; nothing stands in for the best.
    Raises:
        ValueError: there is none, it is incomplete, or the path is a pickle.
    """
    assert which in ("latest", "best")
    path = Path(path)
    if path.is_file():
        _refuse_pickle(path)
        raise ValueError(f"{path}: is a file, expected the folder of a run or checkpoint")
    if not path.is_dir():
        raise ValueError(f"{path}: no such checkpoint or run folder")
    if any((path / name).exists() for name in REQUIRED_FILES[::2]):
        _require_complete(path)
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    pointed = _pointed(folder, which)
    if pointed is not None and _is_complete(pointed):
        return pointed
    complete = _complete_checkpoints(folder)
    if which == "best" and complete:
        raise ValueError(f"{folder}: has no best checkpoint; use the latest, {complete[-1].name}")
    if complete:
        return complete[-1]
    for file in sorted(path.iterdir()):
        if file.suffix in PICKLE_SUFFIXES:
            raise ValueError(f"{file}: is a pickle, which can run code when loaded; we load safetensors only")
    raise ValueError(f"{folder}: holds no complete checkpoint (a folder with {', '.join(REQUIRED_FILES)})")


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Named tensors of a safetensors file, on the CPU.

    Raises:
        ValueError: the file is missing, truncated, or not safetensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the checkpoint is incomplete")
    _refuse_pickle(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: truncated or not safetensors ({reason}); use another checkpoint") from None


def inference_tensors(folder: str | Path) -> dict[str, Tensor]:
    """A codec's tensors for use, in fp32: the averaged ones where there are any, else those of the last update.

    Sums of codebooks that a compact folder leaves out are what its counts and codebooks say.

    Raises:
        ValueError: as `load_tensors`.
    """
    live, averaged = Path(folder) / "model.safetensors", Path(folder) / "ema.safetensors"
    tensors = load_tensors(live) | (load_tensors(averaged) if averaged.is_file() else {})
    compact = [name.removesuffix("codebooks") for name, value in tensors.items()
               if name.endswith("codebooks") and value.dtype == torch.float16]  # fmt: skip
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    for stem in compact:
        if stem + "ema_count" in tensors and stem + "ema_sum" not in tensors:
            tensors[stem + "ema_sum"] = tensors[stem + "codebooks"] * tensors[stem + "ema_count"][..., None]
    return tensors


def discriminators_learned(folder: Path, config: Config) -> bool:
    """Whether a checkpoint, whose config this is, or a pretrained folder has discriminators that were trained.

    A run that started from other weights may have been given trained ones at once; it gets the benefit of the doubt.
    """
    if not (folder / "discriminators.safetensors").is_file():
        return False
    if not (folder / "state.json").is_file() or config.train.init_from:
        return True
    last = phase_at(config, load_state(folder)["step"] - 1)
    return any(phase_config(config, index).loss_weights.adversarial for index in range(last + 1))


def load_state(checkpoint: str | Path) -> dict:
    """The `state` that save_checkpoint was given.

    Raises:
        ValueError: state.json is missing or not JSON.
    """
    path = Path(checkpoint) / "state.json"
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: cannot be read ({reason}); use another checkpoint") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected an object")
    return state


def load_into(module: torch.nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Load every parameter and buffer of a module; nothing may be missing, left over or of another shape.

    Args:
        module: receives the values, in place.
        tensors: as from load_tensors.
        where: names the source in the error.
    Raises:
        ValueError: the tensors are not those of this module; it is left as it was.
    """
    problems = misfits(tensors, {name: value.shape for name, value in module.state_dict().items()})
    if problems:
        raise ValueError(f"{where}: does not fit the config: {problems}; use the run's own config, unless an older "
                         "version wrote it, which this one cannot read")  # fmt: skip
    module.load_state_dict(tensors)


def grow(tensors: dict[str, Tensor], fresh: dict[str, Tensor], n_first: int) -> dict[str, Tensor]:
    """A codec's tensors with the shapes of another's that has more or fewer codebooks, or semantic blocks.

    Args:
        tensors: of a codec whose first residual VQ, where it has two, has `n_first` codebooks.
        fresh: of the codec to start; its values stay where `tensors` has none.
    """
    taken = {}
    for name, value in fresh.items():
        if name.startswith("quantizer.path.") and name not in tensors:
            taken[name] = value
        elif name.startswith("quantizer.semantic.own_inputs.") and name not in tensors:
            taken[name] = tensors.get("quantizer.semantic.project_in.weight", torch.eye(len(value)))
        elif name.startswith("quantizer.semantic.") and value.ndim > 1 and len(value) > n_first == len(tensors[name]):
            taken[name] = torch.cat([tensors[name], value[n_first:]])
        elif name in tensors and tensors[name].shape[1:] == value.shape[1:]:
            taken[name] = tensors[name][: len(value)] if value.ndim else tensors[name]
            if not n_first and name.startswith("quantizer.") and len(value) > len(taken[name]):
                taken[name] = torch.cat([taken[name], value[len(taken[name]) :]])
    return taken


def misfits(tensors: dict[str, Tensor], expected: dict[str, torch.Size]) -> str:
    """How tensors differ from the names and shapes expected, up to three of each kind named; empty if they do not."""
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    reshaped = [
        f"{name} {list(tensors[name].shape)} instead of {list(expected[name])}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name]
    ]
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors, "PREFIX.INDEX.exp_avg" and so on.

    Args:
        optimizer: one whose per-parameter state is tensors only, as AdamW's.
        prefix: keeps several optimizers apart in one file.
    """
    tensors = {f"{prefix}.n_params": torch.tensor(_n_params(optimizer))}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            tensors[f"{prefix}.{index}.{name}"] = value
    return tensors


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], prefix: str) -> None:
    """Put back what optimizer_tensors gave, exact to the bit. Learning rates stay as they are.

    Args:
        optimizer: over the same parameters in the same order.
        tensors: may hold other prefixes too.
        prefix: the one it was saved under.
    Raises:
        ValueError: nothing is saved under the prefix, or it is for other parameters.
    """
    saved = tensors.get(f"{prefix}.n_params")
    expected = _n_params(optimizer)
    if saved is None or saved.item() != expected:
        got = "nothing" if saved is None else f"{saved.item()} parameters"
        raise ValueError(f"optimizer {prefix}: the checkpoint holds {got}, expected {expected} parameters")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        owner, _, rest = key.partition(".")
        index, _, name = rest.partition(".")
        if owner != prefix or not index.isdigit():
            continue
        if value.ndim and value.shape != parameters[int(index)].shape:
            shapes = f"{list(value.shape)}, expected {list(parameters[int(index)].shape)}"
            raise ValueError(f"optimizer {prefix}: {name} of parameter {index} has shape {shapes}")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _n_params(optimizer: torch.optim.Optimizer) -> int:
    """Number of parameters an optimizer steps."""
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _save_tensors(path: Path, named: dict[str, Tensor]) -> None:
    """Write a safetensors file and flush it; copies, because safetensors refuses shared memory."""
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in named.items()}
    save_file(copies, path)
    _fsync(path)


def _fsync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_complete(checkpoint: Path) -> bool:
    """Whether a folder has every file of a checkpoint."""
    return all((checkpoint / name).is_file() for name in REQUIRED_FILES)


def _require_complete(checkpoint: Path) -> None:
    """Name what a checkpoint folder lacks."""
    absent = [name for name in REQUIRED_FILES if not (checkpoint / name).is_file()]
    if absent:
        raise ValueError(f"{checkpoint}: incomplete checkpoint, lacks {', '.join(absent)}; use another")


def _complete_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest step first."""
    found = [path for path in folder.glob("step_*") if path.name[5:].isdigit() and _is_complete(path)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _pointed(folder: Path, which: str) -> Path | None:
    """The folder that a pointer file names, whether it exists or not."""
    pointer = folder / which
    name = pointer.read_text().strip() if pointer.is_file() else ""
    return folder / name if name.startswith("step_") and "/" not in name else None


def _remove_old(folder: Path, keep_last: int) -> None:
    """Remove all but the newest checkpoints, the best, and the one just written."""
    kept = {_pointed(folder, "latest"), _pointed(folder, "best"), *_complete_checkpoints(folder)[-keep_last:]}
    for checkpoint in _complete_checkpoints(folder):
        if checkpoint not in kept:
            # renamed first: a kill in the middle leaves rubbish by name, not half a checkpoint
            rubbish = folder / f"{TEMPORARY}old_{checkpoint.name}"
            os.rename(checkpoint, rubbish)
            shutil.rmtree(rubbish)
    for replaced in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(replaced)


def _refuse_pickle(path: Path) -> None:
    """Refuse by suffix or by content: a pickle runs code when it is loaded."""
    with open(path, "rb") as file:
        start = file.read(4)
    if path.suffix in PICKLE_SUFFIXES or start == ZIP_START:
        raise ValueError(f"{path}: is a pickle, which can run code when loaded; we load safetensors only")
