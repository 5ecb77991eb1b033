"""The subcommands of ``rana-fx``, one module each; ``rana_fx.cli`` puts them together.

A command imports what it needs when it runs, so that help and mistyped options do not wait for transformers.
"""
