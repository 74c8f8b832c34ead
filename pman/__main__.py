"""``python -m pman`` and the console script ``pman``."""

from pman.cli import app


def main() -> None:
    app()


if __name__ == "__main__":
    main()
