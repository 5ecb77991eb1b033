"""Random Transformers, plans and options, compiled and compared with an oracle: ``python -m bench.fuzz``."""
