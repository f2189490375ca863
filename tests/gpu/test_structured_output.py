"""Structured output on a GPU: masks come from the host while steps run ahead on the device."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from headrace import AsyncEngineArgs, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from headrace import StructuredOutputsParams as Structured

ADDRESS = r"[0-9]{1,3}(\.[0-9]{1,3}){3}"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "flags"],
    "additionalProperties": False,
}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_key_value_heads": 2}


def is_what_was_asked_for(number: int, text: str) -> bool:
    match number % 4:
        case 0:
            return re.fullmatch(ADDRESS, text) is not None
        case 1:
            return set(json.loads(text)) == {"name", "flags"}
        case 2:
            return text in ("yes", "no", "perhaps")
    return True


async def complete(engine: AsyncLLM, number: int) -> RequestOutput:
    wanted: list[Structured | None] = [
        Structured(regex=ADDRESS),
        Structured(json=SCHEMA, disable_any_whitespace=True),
        Structured(choice=["yes", "no", "perhaps"]),
        None,
    ]
    params = SamplingParams(
        seed=number,
        max_tokens=100,
        structured_outputs=wanted[number % 4],
        ignore_eos=number % 8 == 2,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    last: RequestOutput | None = None
    async for output in engine.generate(f"the wheel turns {number}", params):
        last = output
    assert last is not None
    return last


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.multi_gpu)])
def test_every_text_is_what_was_asked_for(text_model: Path, tmp_path: Path, ranks: int) -> None:
    if ranks > torch.cuda.device_count():
        pytest.skip("needs two CUDA devices")
    folder = tmp_path / "model"
    shutil.copytree(text_model, folder)
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | SIZES))
    args = AsyncEngineArgs(
        model=str(folder),
        load_format="dummy",
        max_model_len=256,
        max_num_seqs=24,
        num_gpu_blocks_override=80,
        max_num_batched_tokens=128,
        tensor_parallel_size=ranks,
    )

    async def go() -> None:
        async with AsyncLLM.from_engine_args(args) as engine:
            for _ in range(2):
                outputs = await asyncio.gather(*(complete(engine, number) for number in range(48)))
                for number, output in enumerate(outputs):
                    (part,) = output.outputs
                    assert is_what_was_asked_for(number, part.text), part
                    if number % 4 != 3:
                        assert part.finish_reason == ("length" if number % 8 == 2 else "stop")

    asyncio.run(go())
