"""lm-evaluation-harness's own command line with the model "rana": ``python -m rana_fx.lm_eval --model rana ...``.

In and out: what ``lm_eval`` takes and prints. That command finds models in a registry and has no plugin mechanism, so this module
imports ``rana_fx.integrations.lm_eval_harness``, which registers "rana", first.
"""

from __future__ import annotations


def main() -> None:
    """Run the command line of ``lm_eval``."""
    from rana_fx import harness  # registers the model

    del harness
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
