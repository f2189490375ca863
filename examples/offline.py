"""Batches without asyncio: LLM.generate and LLM.chat.

python examples/offline.py [MODEL]
"""

from __future__ import annotations

import sys

from headrace import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Water boils at", "The largest planet is"]
QUESTION = [{"role": "user", "content": "Name three colours."}]

llm = LLM(model=sys.argv[1] if len(sys.argv) > 1 else "demo")
greedy = SamplingParams(temperature=0, max_tokens=16)
for output in llm.generate(PROMPTS, greedy):  # in the order of the prompts
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")

(answer,) = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=32))
print(f"chat -> {answer.outputs[0].text!r}")
