"""The same requests to Headrace and to vLLM: where do tokens, texts, reasons and logprobs differ?

Each engine runs in its own environment and writes what it said; a third call compares:

    python scripts/compare_vllm.py run headrace --model FOLDER --out ours.json
    VLLM_CPU_KVCACHE_SPACE=2 venv/bin/python scripts/compare_vllm.py run vllm --model FOLDER --out theirs.json
    python scripts/compare_vllm.py diff ours.json theirs.json

In float32 and greedy, so that what differs is a difference of meaning, or a near-tie. The last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by a river,",
    "def fibonacci(n):\n",
    "Zwölf Müller mahlen Mehl. 水車は 🎡",
    "1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4,",
]
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs": {"logprobs": 5, "prompt_logprobs": 2},
    "repetition penalty": {"repetition_penalty": 1.3, "logprobs": 0},
    "presence penalty": {"presence_penalty": 1.5},
    "frequency penalty": {"frequency_penalty": 0.7},
    "all penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.2},
    "stop strings": {"stop": [".", "\n", " the"]},
    "stop strings shown": {"stop": ["e", "in"], "include_stop_str_in_output": True, "min_tokens": 5},
    "stop strings that overlap": {"stop": ["the river", "river", "er", "水", "1, 2, 3, 4"], "min_tokens": 1},
    "min tokens": {"stop_token_ids": [28, 30, 198], "min_tokens": 10},
    "logit bias": {"logit_bias": {28: -100.0, 281: 5.0}},
    "allowed tokens": {"allowed_token_ids": list(range(200, 400))},
    "given tokens": {"logprob_token_ids": [28, 30, 198, 0, 49151]},
    "prompt logprobs": {"prompt_logprobs": 5, "max_tokens": 1},
    "bad words": {"bad_words": ["the", "and", "a time", "return"]},
    "no special tokens": {"skip_special_tokens": False, "ignore_eos": True},
}
STRUCTURED: dict[str, dict[str, Any]] = {
    "choice": {"choice": ["Paris", "London", "Rome"]},
    "regex": {"regex": r"[a-z]{3,8} [0-9]{2}"},
    "json": {
        "json": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    },
    "json without whitespace": {
        "json": {"type": "array", "items": {"enum": ["mill", "wheel", 7]}, "minItems": 2, "maxItems": 5},
        "disable_any_whitespace": True,
    },
    "grammar": {"grammar": 'root ::= number (" + " number){1,3}\nnumber ::= [1-9] [0-9]?\n'},
}


def run(package: str, model: str, out: Path, grammars: str | None) -> None:
    """Ask one engine everything; `grammars` is its structured output's backend."""
    api = importlib.import_module(package)
    sampling = importlib.import_module("vllm.sampling_params" if package == "vllm" else "headrace")
    params = [
        api.SamplingParams(**{"temperature": 0, "max_tokens": 48} | wanted) for wanted in CASES.values()
    ]
    for wanted in STRUCTURED.values():
        rules = sampling.StructuredOutputsParams(**wanted)
        params.append(api.SamplingParams(temperature=0, max_tokens=48, structured_outputs=rules))
    config = {} if grammars is None else {"structured_outputs_config": {"backend": grammars}}
    llm = api.LLM(model=model, dtype="float32", max_model_len=512, max_num_seqs=16, **config)
    answers = {}
    for name, each in zip([*CASES, *STRUCTURED], params, strict=True):
        outputs = llm.generate(PROMPTS, each, use_tqdm=False)
        answers[name] = [described(output) for output in outputs]
    out.write_text(json.dumps(answers))


def described(output: Any) -> dict[str, Any]:
    part = output.outputs[0]
    return {
        "tokens": list(part.token_ids),
        "text": part.text,
        "reasons": [part.finish_reason, part.stop_reason],
        "logprobs": positions(part.logprobs),
        "prompt_logprobs": positions(output.prompt_logprobs),
        "cumulative_logprob": part.cumulative_logprob,
    }


def positions(logprobs: Any) -> Any:
    """[[token id, logprob, rank, decoded token], ...] of each position."""
    if logprobs is None:
        return None
    return [
        None if here is None else [[token, e.logprob, e.rank, e.decoded_token] for token, e in here.items()]
        for here in logprobs
    ]


def diff(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Print each case's differences; returns the sums."""
    total = {"answers": 0, "same_tokens": 0, "same_text": 0, "same_reasons": 0, "worst_logprob": 0.0}
    entries = {"entries": 0, "same_rank": 0, "same_decoded": 0}
    for name in ours:
        for prompt, mine, other in zip(PROMPTS, ours[name], theirs[name], strict=True):
            total["answers"] += 1
            for key in ("tokens", "text", "reasons"):
                same = mine[key] == other[key]
                total[f"same_{key}"] += same
                if not same:
                    print(f"{name}, {prompt!r}: {key}\n  ours   {mine[key]!r}\n  theirs {other[key]!r}")
            if mine["tokens"] == other["tokens"]:
                for key in ("logprobs", "prompt_logprobs"):
                    total["worst_logprob"] = max(
                        total["worst_logprob"], compare(mine[key], other[key], entries)
                    )
    return {**total, **entries}


def compare(mine: Any, other: Any, entries: dict[str, int]) -> float:
    """The largest difference of a logprob that both tell."""
    assert (mine is None) == (other is None)
    worst = 0.0
    for one, two in zip(mine or [], other or [], strict=True):
        theirs = {entry[0]: entry for entry in two or []}
        for token, value, rank, decoded in one or []:
            if token in theirs:
                entries["entries"] += 1
                entries["same_rank"] += rank == theirs[token][2]
                entries["same_decoded"] += decoded == theirs[token][3]
                if decoded != theirs[token][3]:
                    print(f"  token {token} decoded: ours {decoded!r}, theirs {theirs[token][3]!r}")
                worst = max(worst, abs(value - theirs[token][1]))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, dest="command")
    asking = commands.add_parser("run", help="ask one engine")
    asking.add_argument("engine", choices=("headrace", "vllm"))
    asking.add_argument("--model", required=True, help="a folder with config, tokenizer and safetensors")
    asking.add_argument("--out", type=Path, required=True)
    asking.add_argument("--grammars", help="structured output by this backend, such as guidance")
    comparing = commands.add_parser("diff", help="compare what two have said")
    comparing.add_argument("ours", type=Path)
    comparing.add_argument("theirs", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        run(args.engine, args.model, args.out, args.grammars)
    else:
        print(json.dumps(diff(json.loads(args.ours.read_text()), json.loads(args.theirs.read_text()))))


if __name__ == "__main__":
    main()
