"""Makes a user of the simulated Zion and prints what to paste: `docker compose run --rm demo`."""

# ruff: noqa: INP001 -- run as a file, a part of no package
from __future__ import annotations

import json
import os
import sys
import urllib.request
from typing import Final

_TIMEOUT_S: Final = 5


def main(zion_url: str, proxy_url: str) -> None:
    """A user called `demo`, with 1,000 requests and a million tokens a month; made anew if it was there."""
    told = {"externalId": "demo", "tokenSeconds": 30 * 86_400}
    request = urllib.request.Request(f"{zion_url}/admin/users", json.dumps(told).encode())  # noqa: S310 -- the operator's
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 -- the same
        token = json.load(answer)["token"]
    body = '{"model": "openai/gpt-4o-mini", "messages": [{"role": "user", "content": "Hello"}]}'
    print(f"TOKEN={token}")  # noqa: T201 -- its whole purpose
    print(  # noqa: T201
        f'curl {proxy_url}/v1/chat/completions -H "Authorization: Bearer $TOKEN"'
        f" -H 'Content-Type: application/json' -d '{body}'"
    )


if __name__ == "__main__":
    main(sys.argv[1], os.environ["PROXY_URL"])
