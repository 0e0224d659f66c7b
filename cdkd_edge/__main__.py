"""``python -m cdkd_edge``."""

from cdkd_edge.cli import main

if __name__ == "__main__":
    main()
