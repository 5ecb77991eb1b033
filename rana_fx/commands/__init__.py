"""The subcommands of ``rana-fx``, one module each; ``rana_fx.cli`` puts them together.

A command imports its dependencies when it runs, so that help and mistyped options do not import transformers.
"""
