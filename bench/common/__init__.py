"""What benches of speed and of quality share."""
