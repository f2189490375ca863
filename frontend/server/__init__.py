"""The OpenAI-compatible server: HTTP in, `AsyncLLM` behind it. `headrace serve` starts it.

`protocol.py` says what a request may hold, one module for each family of routes answers it, `guard.py` stands
before them all, and `main.py` gives them a process. Nothing here runs without the extra `headrace[server]`.
"""
