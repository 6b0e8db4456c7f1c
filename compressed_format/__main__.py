"""``python -m compressed_format`` is ``compressed-format``."""

from compressed_format.cli.program import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
