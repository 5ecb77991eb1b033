"""``python -m bench.quality``: the bench of losses against budgets (bench/quality/quality.py)."""

from bench.quality.quality import main

if __name__ == "__main__":
    main()
