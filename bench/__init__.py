"""Benchmarks: latency and memory in ``speed``, losses and errors in ``quality``, code that both use in ``common``.

Result rows and docs name a bench without its folder (``python -m bench.decode``); ``__path__`` makes these names importable.
"""

from pathlib import Path

__path__ += [str(Path(__file__).parent / folder) for folder in ("speed", "quality", "common")]
