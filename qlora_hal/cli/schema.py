"""`qlora-hal schema`: the JSON schema of the settings, for editors."""

from __future__ import annotations

import json


def schema() -> int:
    """Print the JSON schema of the settings file."""
    print(schema_text())
    return 0


def schema_text() -> str:
    """The schema as indented JSON."""
    from qlora_hal.config.schema import RunConfig

    content = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    return json.dumps(content, indent=2)
