"""``python -m nlhf``, which is what launchers of several processes start."""

from nlhf.cli import main

if __name__ == "__main__":
    main()
