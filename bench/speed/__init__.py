"""Benches of latency, memory and compile time."""
