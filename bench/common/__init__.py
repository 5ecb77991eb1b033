"""Code that the benches of speed and of quality use: models, text, calibration, result rows, tables, plots."""
