"""lm-evaluation-harness's own command line with the model "rana": ``python -m rana_fx.lm_eval --model rana ...``.

In and out: what ``lm_eval`` takes and prints. That command loads models from a list inside its package and has no hook for those
of others, so that something has to import ``rana_fx.integrations.lm_eval_harness`` first.
"""

from __future__ import annotations


def main() -> None:
    """``lm_eval``'s command line."""
    from rana_fx import harness  # registers the model

    del harness
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
