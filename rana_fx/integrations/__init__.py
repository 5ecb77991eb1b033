"""Other projects' harnesses and trainers."""
