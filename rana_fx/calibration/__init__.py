"""Running a model on text: the layout of its linears, and samples and sensitivities of what they read."""
