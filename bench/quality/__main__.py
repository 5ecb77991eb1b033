"""``python -m bench.quality``: loss against budget (bench/quality/quality.py)."""

from bench.quality.quality import main

if __name__ == "__main__":
    main()
