"""``python -m pman`` and the console script ``pman``."""

import sys


def main() -> None:
    try:
        from pman.cli import app  # takes a second, in which an interrupt must end it quietly too

        app()
    except KeyboardInterrupt:  # typer itself sees to those that come while a command runs
        sys.exit(130)


if __name__ == "__main__":
    main()
