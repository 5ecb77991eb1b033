"""Benches: latency in ``speed``, losses in ``quality``, what both share in ``common``.

Commands recorded in results/ and the docs name a bench without its folder (``python -m bench.decode``): they still run.
"""

from pathlib import Path

__path__ += [str(Path(__file__).parent / folder) for folder in ("speed", "quality", "common")]
