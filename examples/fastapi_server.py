"""A small HTTP server around AsyncLLM.

pip install headrace fastapi uvicorn
python examples/fastapi_server.py [--model MODEL] [--host HOST] [--port PORT]
curl localhost:8000/generate -H 'Content-Type: application/json' -d '{"prompt": "Hello, my name is"}'
curl -N localhost:8000/stream -H 'Content-Type: application/json' -d '{"prompt": "Hello, my name is"}'
"""

from __future__ import annotations

import argparse
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from headrace import (
    AsyncEngineArgs,
    AsyncLLM,
    RequestError,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
)
from pydantic import BaseModel


class Prompt(BaseModel):
    """The body of a request."""

    prompt: str
    max_tokens: int = 64
    temperature: float = 0.8
    seed: int | None = None


@asynccontextmanager
async def run_engine(app: FastAPI) -> AsyncIterator[None]:
    """The engine lives as long as the server; the server's own loop is the one that it uses."""
    async with AsyncLLM.from_engine_args(app.state.engine_args) as engine:
        app.state.engine = engine
        yield


app = FastAPI(lifespan=run_engine)
app.state.engine_args = AsyncEngineArgs(model="demo")


@app.post("/generate")
async def generate(body: Prompt, request: Request) -> dict[str, str | None]:
    """The whole answer at once."""
    outputs = start(request.app.state.engine, body, RequestOutputKind.FINAL_ONLY)
    final = [output async for output in outputs][-1].outputs[0]
    return {"text": final.text, "finish_reason": final.finish_reason}


@app.post("/stream")
async def stream(body: Prompt, request: Request) -> StreamingResponse:
    """The answer as plain text while it grows. A client that hangs up ends the generator, which aborts."""
    outputs = start(request.app.state.engine, body, RequestOutputKind.DELTA)
    first = await anext(outputs)  # a bad request fails here, before the status line is on its way

    async def text() -> AsyncIterator[str]:
        yield first.outputs[0].text
        async for output in outputs:
            yield output.outputs[0].text

    return StreamingResponse(text(), media_type="text/plain")


def start(engine: AsyncLLM, body: Prompt, kind: RequestOutputKind) -> AsyncIterator[RequestOutput]:
    params = SamplingParams(
        max_tokens=body.max_tokens, temperature=body.temperature, seed=body.seed, output_kind=kind
    )
    return engine.generate(body.prompt, params, uuid.uuid4().hex)


@app.exception_handler(RequestError)
async def refuse(_request: Request, error: RequestError) -> JSONResponse:
    """What cannot be served names the parameter, the value and the limit; the others go on."""
    return JSONResponse({"error": str(error), "parameter": error.parameter}, status_code=400)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    app.state.engine_args = AsyncEngineArgs(model=args.model)
    uvicorn.run(app, host=args.host, port=args.port)
