"""What it costs a frontend to turn a token into text: the engine's decoders beside the tokenizers package's.

    python scripts/bench_detokenizer.py [--model demo]

Decodes the same tokens one by one, as a stream does, with each decoder; the median of several rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from headrace.frontend.detokenizer import Decoder, DecoderFactory, StreamDecoder
from headrace.frontend.engine_args import AsyncEngineArgs, resolve
from headrace.frontend.stop_strings import StopStrings
from headrace.frontend.tokenizer import Tokenizer

TEXT = """The wheel turns as the water falls; nobody's slow bucket stops it. Das Mühlrad läuft, weil Wasser
fällt.
水車は川の水で回る。 🎡 def mill(wheel): return wheel.turn(water=1.5)\n"""
ROUNDS = 7


def microseconds_per_token(make: Callable[[], Decoder], ids: list[int], stops: list[str]) -> float:
    """The median over rounds of decoding `ids` one by one, with stop strings looked for if there are any."""
    times: list[float] = []
    for _ in range(ROUNDS):
        decoder, watch = make(), StopStrings(stops, False) if stops else None
        start = time.perf_counter()
        for token in ids:
            text = decoder.push((token,))
            if watch is not None:
                watch.push(text)
        times.append((time.perf_counter() - start) / len(ids) * 1e6)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo", help="whose tokenizer")
    parser.add_argument("--tokens", type=int, default=20_000)
    args = parser.parse_args()
    config = resolve(AsyncEngineArgs(model=args.model))
    tokenizer = Tokenizer.load(str(config.tokenizer))
    ids = tokenizer.encode(TEXT)
    ids = (ids * (args.tokens // len(ids) + 1))[: args.tokens]
    factory = DecoderFactory(tokenizer)
    ours = type(factory(True)).__name__
    for name, make, stops in (
        (ours, lambda: factory(True), []),
        ("DecodeStream", lambda: StreamDecoder(tokenizer.backend, True), []),
        (f"{ours}, 1 stop string", lambda: factory(True), ["###"]),
        (f"{ours}, 64 stop strings", lambda: factory(True), [f"<stop {i}>" for i in range(64)]),
    ):
        print(f"{name:40} {microseconds_per_token(make, ids, stops):7.3f} us/token")


if __name__ == "__main__":
    main()
