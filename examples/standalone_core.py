"""An engine core that is nobody's child, and a frontend that comes and goes.

    headrace engine-core --model demo --listen ipc:///run/user/1000/headrace/core &
    python examples/standalone_core.py ipc:///run/user/1000/headrace/core

An address is all that the frontend needs: the core tells it the rest. Leaving the engine leaves the core up.
"""

from __future__ import annotations

import asyncio
import sys

from headrace import AsyncEngineArgs, AsyncLLM, SamplingParams


async def main(address: str) -> None:
    for visit in range(2):
        async with AsyncLLM.from_engine_args(AsyncEngineArgs(engine_core_address=address)) as engine:
            params = SamplingParams(temperature=0, max_tokens=16)
            async for output in engine.generate("The key to happiness is", params, f"visit-{visit}"):
                if output.finished:
                    print(f"visit {visit}: {output.outputs[0].text!r}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
