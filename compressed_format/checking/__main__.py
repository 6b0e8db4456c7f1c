"""``python -m compressed_format.checking`` prints ``docs/findings.md``."""

from __future__ import annotations

from compressed_format.checking.table import page

if __name__ == "__main__":
    print(page(), end="")
