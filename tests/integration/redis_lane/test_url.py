from __future__ import annotations

import pytest

from sentinel_shared.errors import SettingsError
from sentinel_shared.redis_lane.url import Address, Kind, RedisUrl, parse_url

SECRET = "s3cret-canary"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://localhost", RedisUrl(Kind.SINGLE, (Address("localhost", 6379),), False, None, None, 0, None)),
        ("redis://[::1]:7000/2", RedisUrl(Kind.SINGLE, (Address("::1", 7000),), False, None, None, 2, None)),
        ("rediss://u:p%40@h", RedisUrl(Kind.SINGLE, (Address("h", 6379),), True, "u", "p@", 0, None)),
        (
            "unix://:p@/run/r.sock?db=4",
            RedisUrl(Kind.SINGLE, (Address("/run/r.sock", None),), False, None, "p", 4, None),
        ),
        (
            "redis+sentinel://a,b:1/main/5",
            RedisUrl(Kind.SENTINEL, (Address("a", 26379), Address("b", 1)), False, None, None, 5, "main"),
        ),
        (
            "rediss+cluster://:p@a:1,b",
            RedisUrl(Kind.CLUSTER, (Address("a", 1), Address("b", 6379)), True, None, "p", 0, None),
        ),
    ],
)
def test_every_form_is_read(text, expected):
    assert parse_url(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost:6379",
        f"http://u:{SECRET}@localhost",
        "redis://",
        f"redis://u:{SECRET}@",
        f"redis://u:{SECRET}@host:port",
        f"redis://u:{SECRET}@host:0",
        f"redis://u:{SECRET}@host:70000",
        f"redis://u:{SECRET}/x@host",
        f"redis://u:{SECRET}#x@host",
        f"redis://u:{SECRET}@host/zero",
        f"redis://u:{SECRET}@host/0/1",
        f"redis://u:{SECRET}@host?db=1",
        f"redis://u:{SECRET}@a,b",
        f"redis://u:{SECRET}@[::1",
        f"redis://{SECRET}@host",
        f"unix://u:{SECRET}@relative/path",
        f"unix://:{SECRET}@/run/r.sock?password={SECRET}",
        f"redis+sentinel://u:{SECRET}@host",
        f"redis+cluster://u:{SECRET}@host/1",
    ],
)
def test_a_malformed_one_is_told_in_one_line_without_its_password(text):
    with pytest.raises(SettingsError) as caught:
        parse_url(text)
    message = str(caught.value)
    assert message.startswith("REDIS_URL: ")
    assert "takes redis://" in message
    assert "\n" not in message
    assert SECRET not in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_url_never_shows_its_password():
    assert SECRET not in repr(parse_url(f"redis://u:{SECRET}@host"))
