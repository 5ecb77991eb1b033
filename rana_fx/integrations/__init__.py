"""Integrations with evaluation harnesses and trainers of other projects."""
