"""``python -m compressed_format.config.schema`` prints the JSON Schema of hand-written configs."""

from __future__ import annotations

import json

from compressed_format.config import json_schema

__all__: list[str] = []

if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
