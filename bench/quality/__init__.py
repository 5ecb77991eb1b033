"""Losses at a budget."""
