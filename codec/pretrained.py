"""Where a codec's weights come from and go to: runs, checkpoints, pretrained folders, ids on the Hugging Face hub.

A pretrained folder is what one publishes:

    config.json         {"format": "codec", "version": 1, "model": {...}} and, where known, "source" and "step"
    model.safetensors   by the names of Codec(model).state_dict(), weight norm in place: training can go on from it
    README.md           the model card

With prior.safetensors beside them codec files are smaller (`codec prior`). A compact one holds its tensors in fp16 and can
also hold config.yaml and discriminators.safetensors, so that training goes on with the same adversary. The one that comes
with this package can be called "base".
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors.torch import save_file
from torch import Tensor

from codec.checkpoint import PICKLE_SUFFIXES, find_checkpoint
from codec.config import ModelConfig, model_config, parse_config, to_dict
from codec.files import write_atomically

FORMAT, VERSION = "codec", 1
WEIGHTS = "model.safetensors"
BASE = Path(__file__).parent / "base"
CONVERTIBLE = ("dac", "encodec", "mimi")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
HUB_FILES = ("config.json", WEIGHTS, WEIGHTS + ".index.json", "config.yaml", "state.json", "ema.safetensors",
             "discriminators.safetensors", "prior.safetensors")  # fmt: skip
NORM = ".parametrizations.weight.original"  # NORM + "0" is the gain g, NORM + "1" the direction v


def fetch(path_or_hub_id: str | Path) -> Path:
    """The local folder itself, the package's own for "base", or the folder a hub id was downloaded to.

    Raises:
        ValueError: no such folder, and the hub does not give it either, or no safetensors; one line.
    """
    path, hub_id = Path(path_or_hub_id), str(path_or_hub_id)
    if hub_id == "base" and not path.exists():
        return BASE
    if path.exists() or not HUB_ID.fullmatch(hub_id):
        return path
    owner = Path(hub_id).parts[0]
    if Path(owner).exists():
        raise ValueError(f"{hub_id}: no such folder in {owner}, which is here, so the hub was not asked; check the name")
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{hub_id}: no such folder here, and the hub did not give it ({reason}); check the name and the "
                         "network, log in by `hf auth login` if it is gated, or name a local folder") from None  # fmt: skip
    if not any((folder / name).is_file() for name in (WEIGHTS, WEIGHTS + ".index.json")):
        held = "only pickled weights?"
        with contextlib.suppress(Exception):  # the list only makes the error clearer
            held = "it holds " + ", ".join(HfApi().list_repo_files(hub_id)[:12])
        raise ValueError(f"{hub_id}: no {WEIGHTS} in that repository ({held}); name one that has it")
    return folder


def public_name(source: str | Path) -> str:
    """A source as it may be published: a hub id whole, of a local path the last part only."""
    if HUB_ID.fullmatch(str(source)) and not Path(source).exists():
        return str(source)
    return Path(source).resolve().name


def resolve(path_or_hub_id: str | Path, which: str = "latest") -> Path:
    """The folder that holds a codec's model.safetensors, with config.yaml (a checkpoint) or our config.json beside it.

    Args:
        path_or_hub_id: a run, one of its checkpoints, a pretrained folder, "base", or "owner/name" on the hub.
        which: "latest" or "best", where it is a run.
    Raises:
        ValueError: there is none, or the weights there are sharded, pickled or of another architecture; one line.
    """
    folder = fetch(path_or_hub_id)
    if not (folder / "config.json").is_file():
        if (folder / WEIGHTS).is_file() and not (folder / "config.yaml").is_file():
            raise ValueError(f"{folder}: holds {WEIGHTS} but lacks the config.json, transformers' or ours, that belongs to it "
                             "(or, of a checkpoint, config.yaml); copy it there")  # fmt: skip
        return find_checkpoint(folder, which)
    raw = read_json(folder / "config.json")
    if raw.get("format") == FORMAT:
        require_weights(folder)
        return folder
    if raw.get("model_type") in CONVERTIBLE:
        raise ValueError(f"{folder}: holds {raw['model_type']} weights as transformers writes them, expected a codec; "
                         f"convert them: codec convert --from {path_or_hub_id} OUT")  # fmt: skip
    raise ValueError(f"{folder}: {not_ours(raw)}")


def read_model(folder: Path) -> ModelConfig:
    """The model section of what `resolve` gave."""
    path = folder / "config.json"
    if path.is_file():
        raw = read_json(path)
        if raw.get("version") != VERSION or not isinstance(raw.get("model"), dict):
            raise ValueError(f"{path}: version {raw.get('version')!r} with sections {sorted(raw)}, expected version "
                             f"{VERSION} with a model section; write it anew by `codec convert`")  # fmt: skip
        return model_config(raw["model"], str(path))
    path = folder / "config.yaml"
    return parse_config(path.read_text(encoding="utf-8"), str(path)).model


def write_pretrained(path: str | Path, model: ModelConfig, tensors: dict[str, Tensor], card: str, about: dict,
                     beside: dict[str, dict[str, Tensor] | str | bytes] | None = None) -> None:  # fmt: skip
    """Write a pretrained folder whole.

    Args:
        tensors: by the names of Codec(model).state_dict(), weight norm in place.
        about: what else config.json tells: "source", "step".
        beside: further files by name: tensors, text or bytes.
    Raises:
        ValueError: path exists and is not an empty folder.
    """
    config = {"format": FORMAT, "version": VERSION, **about, "model": to_dict(model)}
    with new_folder(path) as folder:
        texts = {"config.json": json.dumps(config, indent=1) + "\n", "README.md": card}
        for name, content in {WEIGHTS: tensors, **texts, **(beside or {})}.items():
            if isinstance(content, str | bytes):
                write_atomically(folder / name, content)
            else:
                save_file({key: value.detach().cpu().contiguous() for key, value in content.items()}, folder / name)


def compact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in fp16, without the sums of codebooks, which counts and codebooks give again.

    Raises:
        ValueError: a value is larger than fp16 holds.
    """
    sums = {name for name in tensors if name.endswith("ema_sum") and name.removesuffix("ema_sum") + "codebooks" in tensors}
    halves = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items() if name not in sums}
    large = [name for name, value in halves.items() if value.is_floating_point() and not value.isfinite().all()]
    if large:
        raise ValueError(f"{large[0]}: holds values that fp16 cannot (its largest is 65504); leave --compact out")
    return halves


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to write into, renamed to `path` when all went well and removed when not. It replaces nothing."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: exists and is not empty; name another, or remove it first")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_json(path: Path) -> dict:
    """A JSON object from a file."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]}); expected a JSON object") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds a {type(raw).__name__}, expected a JSON object")
    return raw


def require_weights(folder: Path) -> None:
    """Refuse a folder without model.safetensors, and say what it holds instead."""
    if (folder / WEIGHTS).is_file():
        return
    if (folder / (WEIGHTS + ".index.json")).exists():
        raise ValueError(f"{folder}: its weights are sharded ({WEIGHTS}.index.json), expected one {WEIGHTS}; "
                         "save them again with a larger max_shard_size")  # fmt: skip
    pickles = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise ValueError(f"{folder}: its weights are a pickle ({pickles[0]}), which can run code when loaded; "
                         f"expected {WEIGHTS}: save them again as safetensors")  # fmt: skip
    raise ValueError(f"{folder}: holds no {WEIGHTS}; copy it there, or name another folder")


def not_ours(raw: dict) -> str:
    """What a config.json is, where it is neither ours nor of an architecture we convert."""
    return (f"its config.json has model_type {raw.get('model_type')!r}, expected {' | '.join(CONVERTIBLE)}, which "
            "configs/dac_*.yaml, configs/encodec_24khz.yaml and configs/mimi.yaml fit")  # fmt: skip


def with_weight_norm(tensors: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors with plain weights split into gain and direction where `names` have those; folded they are the same.

    The gain is the norm as the folding kernel computes it, so that on the CPU not one bit of the weight changes;
    `torch.norm_except_dim`, which `weight_norm` itself uses, rounds otherwise.
    """
    tensors = dict(tensors)
    for stem in [name.removesuffix(NORM + "0") for name in names if name.endswith(NORM + "0")]:
        if stem + ".weight" in tensors:
            v = tensors.pop(stem + ".weight").contiguous()
            unit = v.new_ones(len(v), 1, 1)
            tensors[stem + NORM + "0"] = torch._weight_norm_interface(v, unit, 0)[1].view_as(unit)
            tensors[stem + NORM + "1"] = v
    return tensors


def without_weight_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with every gain and direction folded into one plain weight."""
    tensors = dict(tensors)
    for stem in [name.removesuffix(NORM + "0") for name in tensors if name.endswith(NORM + "0")]:
        g, v = tensors.pop(stem + NORM + "0"), tensors.pop(stem + NORM + "1")
        tensors[stem + ".weight"] = torch._weight_norm(v, g, 0)
    return tensors
