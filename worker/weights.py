"""Fill a model's parameters from a safetensors folder, a GGUF file, or a seed.

Which tensors there must be and where they go is the model's to say (`CausalLM.weights`); this file knows the
containers. Only this rank's part of a tensor is copied.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..ipc.config import EngineConfig
from ..ipc.errors import ConfigError
from .control_group import usable_cores
from .layers import Weight, Weights
from .models.causal_lm import CausalLM
from .parallel import TensorParallel

_DUMMY_PERIOD = 1_048_573
"""A prime, so that no two rows of a matrix repeat each other."""
_DUMMY_SCALE = 0.02


@torch.inference_mode()
def load_weights(model: CausalLM, config: EngineConfig, device: torch.device, tp: TensorParallel) -> None:
    """Fill the parameters of `model` as `config.load_format` says.

    Raises ConfigError that names the tensor or the file when one is missing, damaged or of the wrong shape.
    """
    path = Path(config.model_path)
    match config.load_format:
        case "dummy":
            fill_dummy(model, config.seed)
        case "gguf":
            _load_gguf(model, path, _num_threads(tp))
        case "safetensors":
            _load_folder(model, path, _num_threads(tp))
        case "oracle":
            raise AssertionError("the oracle has no weights")


def fill_dummy(model: CausalLM, seed: int) -> None:
    """Random weights, a function of the seed and each tensor's name and shape alone: norms are ones, all else
    is normal with a standard deviation of 0.02.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(_DUMMY_PERIOD, generator=generator).mul_(_DUMMY_SCALE)
    # Where the parameters are: a host would take minutes for what a GPU makes in seconds.
    noise = noise.to(next(model.parameters()))
    for name, weight in model.weights().items():
        weight.load(_dummy(name, weight.shape, noise))


def weights_bytes(model: CausalLM) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


@torch.inference_mode()
def weights_checksum(model: CausalLM) -> str:
    """SHA-256 of names and contents, hexadecimal; the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _dummy(name: str, shape: tuple[int, ...], noise: Tensor) -> Tensor:
    if len(shape) == 1 and name.endswith(".weight"):
        return noise.new_ones(shape)
    size = prod(shape)
    start = zlib.crc32(name.encode()) % len(noise)
    return noise.roll(-start).repeat(-(-size // len(noise)))[:size].view(shape)


def _load_gguf(model: CausalLM, path: Path, num_threads: int) -> None:
    from .gguf import ROPE_DIVISORS, GgufFile  # noqa: PLC0415 (only a GGUF file needs the gguf package)

    file = GgufFile(path)
    found = {name: (name, shape) for name, shape in file.shapes().items() if name != ROPE_DIVISORS}
    weights = _matched(model, found, path)
    _run_all((copy for name, weight in weights.items() for copy in file.copies(name, weight)), num_threads)


def _load_folder(model: CausalLM, folder: Path, num_threads: int) -> None:
    tensors = _read_folder(folder)
    found = {model.canonical_name(name): (name, tuple(tensor.shape)) for name, tensor in tensors.items()}
    weights = _matched(model, found, folder)
    for there, _ in (found[name] for name in weights):
        if not tensors[there].is_floating_point():
            what = f"has tensor {there!r} of {tensors[there].dtype}: quantized weights are not supported"
            raise _mismatch(folder, what, [there])
    copies = (_copy(weight, tensors[found[name][0]]) for name, weight in weights.items())
    _run_all(copies, num_threads)


def _copy(weight: Weight, tensor: Tensor) -> Callable[[], None]:
    return lambda: weight.load(tensor)


def _matched(model: CausalLM, found: dict[str, tuple[str, tuple[int, ...]]], source: Path) -> Weights:
    """The model's weights, held against what the checkpoint has: canonical name -> (name there, shape)."""
    weights = model.weights()
    if missing := [name for name in weights if name not in found]:
        raise _mismatch(source, f"lacks tensor {missing[0]!r}", missing)
    if extra := [
        there
        for name, (there, _) in found.items()
        if name not in weights and not name.endswith(model.ignored_weights)
    ]:
        raise _mismatch(source, f"has tensor {extra[0]!r}, which {type(model).__name__} has not", extra)
    for name, weight in weights.items():
        there, shape = found[name]
        if shape != weight.shape:
            what = f"has tensor {there!r} of shape {list(shape)}; its config asks for {list(weight.shape)}"
            raise _mismatch(source, what, [name])
    return weights


def _mismatch(source: Path, what: str, names: list[str]) -> ConfigError:
    more = f" (and {len(names) - 1} more such)" if len(names) > 1 else ""
    return ConfigError(f"model: {str(source)!r} {what}{more}", parameter="model", value=names[0])


def _read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, mapped rather than read where the container allows."""
    if files := _shards(folder):
        return {name: tensor for file in files for name, tensor in _read_safetensors(file)}
    raise ConfigError(
        f"model: {str(folder)!r} has no weights: no *.safetensors (pickled weights are never opened); "
        f"load_format='dummy' makes random ones",
        parameter="model",
        value=folder,
    )


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        # Mistral's folders hold the weights twice, once under names of its own.
        files = folder.glob("*.safetensors")
        return sorted(file for file in files if not file.name.startswith("consolidated"))
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [folder / name for name in names]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(index, error) from error


def _read_safetensors(file: Path) -> Iterable[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            return [(name, tensors.get_tensor(name)) for name in tensors.keys()]  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ConfigError(f"model: cannot read {str(file)!r}: {reason}", parameter="model", value=file)


def _run_all(copies: Iterable[Callable[[], None]], num_threads: int) -> None:
    with ThreadPoolExecutor(num_threads) as pool:
        for future in [pool.submit(_run, copy) for copy in copies]:
            future.result()


@torch.inference_mode()
def _run(copy: Callable[[], None]) -> None:
    """Inference mode is a thread's own, and the parameters may have been made in it."""
    copy()


def _num_threads(tp: TensorParallel) -> int:
    return max(1, min(8, usable_cores() // tp.size))
