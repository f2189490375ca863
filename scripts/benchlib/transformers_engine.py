"""The plain loop: transformers' `generate` on one padded batch at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from benchlib.engines import Request, Trace


class TransformersEngine:
    """Takes `max_num_seqs` requests at a time and generates until the longest of them is done."""

    def __init__(
        self,
        model: Path,
        *,
        dtype: str = "bfloat16",
        load_format: str = "auto",
        max_num_seqs: int = 32,
        **_: Any,
    ) -> None:
        transformers.logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kind: torch.dtype = getattr(torch, "bfloat16" if dtype == "auto" else dtype)
        if load_format == "dummy":
            self._model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=kind)
        else:
            self._model = _load(model, kind)
        self._model.to(device).eval()
        self._device, self._batch_size = device, max_num_seqs

    def run(self, requests: Sequence[Request]) -> list[Trace]:
        """First come, first served: those who wait when a batch ends make up the next one."""
        start = time.perf_counter()
        waiting = sorted(range(len(requests)), key=lambda index: requests[index].arrival)
        traces: dict[int, Trace] = {}
        while waiting:
            first = requests[waiting[0]].arrival
            time.sleep(max(0.0, start + first - time.perf_counter()))
            now = max(first, time.perf_counter() - start)
            batch = [index for index in waiting[: self._batch_size] if requests[index].arrival <= now]
            del waiting[: len(batch)]
            traces.update(zip(batch, self._generate([requests[i] for i in batch], start), strict=True))
        return [traces[index] for index in range(len(requests))]

    def shutdown(self) -> None:
        del self._model

    def _generate(self, batch: Sequence[Request], start: float) -> list[Trace]:
        longest = max(len(request.prompt) for request in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, longest - len(request.prompt) :] = 1
        clock = _Clock()
        temperature = batch[0].temperature
        how = GenerationConfig(
            max_new_tokens=max(request.output_len for request in batch),
            do_sample=temperature > 0,
            temperature=temperature or None,
            top_k=0,
            pad_token_id=0,
            eos_token_id=None,
        )
        with torch.inference_mode():
            self._model.generate(
                ids.to(self._device),
                attention_mask=mask.to(self._device),
                generation_config=how,
                streamer=clock,
            )
        return [
            Trace(start + request.arrival, [(at, 1) for at in clock.times[: request.output_len]])
            for request in batch
        ]


class _Clock:
    """What `generate` calls a streamer: told of the prompt first, then of each token of the batch."""

    def __init__(self) -> None:
        self._calls: list[float] = []

    @property
    def times(self) -> list[float]:
        return self._calls[1:]

    def put(self, tokens: torch.Tensor) -> None:
        tokens.tolist()  # on a GPU: wait until they are really there
        self._calls.append(time.perf_counter())

    def end(self) -> None:
        pass


def as_folder(gguf: Path) -> Path:
    """The same model, dequantized, as a folder of safetensors beside the file; made once."""
    folder = gguf.with_suffix(".hf")
    if not (folder / "tokenizer.json").is_file():
        _load(gguf, torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


def _load(model: Path, dtype: torch.dtype) -> Any:
    if model.is_file():
        how: dict[str, Any] = {"gguf_file": model.name, "dtype": dtype}
        if hasattr(transformers, "GgufConfig"):  # such a version could also keep the weights packed
            how["quantization_config"] = transformers.GgufConfig(dequantize=True)
        return AutoModelForCausalLM.from_pretrained(model.parent, **how)
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
