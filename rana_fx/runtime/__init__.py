"""A plan on a live model: attaching, guards, weight layouts, memory, prefill modes, measurement."""
