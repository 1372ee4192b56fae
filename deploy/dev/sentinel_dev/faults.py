"""Faults that tests and people put into a simulator while it runs: which requests go wrong, how, and how often."""

from __future__ import annotations

import random
from collections.abc import Collection
from typing import Final, Literal

import msgspec

_RULES_MOST: Final = 1_000

Kind = Literal[
    "delay",
    "status",
    "refuse",
    "hang",
    "applied_then_silent",
    "partial",
    "garbage",
    "missing_items",
    "no_batch",
    "malformed_limits",
]


class Rule(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One fault. `times` None is for ever; `probability` is per request, for `partial` per item."""

    kind: Kind
    route: str = "*"
    seconds: float = 1.0
    """Of `delay`."""
    status: int | None = None
    """Of `status` (503), `no_batch` (404); of `applied_then_silent`: answer this instead of nothing."""
    retry_after: float | None = None
    """Seconds, as the header of `status`."""
    hang: bool = False
    """Of `applied_then_silent`: keep the connection open instead of closing it."""
    permanent: bool = False
    """Of `partial`: items fail for good, not for now."""
    external_id: str | None = None
    """Of `partial`: only items about this user."""
    limit_name: str | None = None
    """Of `partial`: only items about this limit."""
    times: int | None = None
    probability: float = 1.0
    seed: int = 0


class Armed:
    """A rule in force, with its own dice and its count of requests that it concerned."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.fired = 0
        self._random = random.Random(rule.seed)  # noqa: S311  dice that can be thrown again

    def fires(self, route: str) -> bool:
        """Whether it concerns this request; counts it if so."""
        rule = self.rule
        if rule.route not in {"*", route} or (rule.times is not None and self.fired >= rule.times):
            return False
        if rule.kind != "partial" and not self.hits():
            return False
        self.fired += 1
        return True

    def hits(self) -> bool:
        return self.rule.probability >= 1 or self._random.random() < self.rule.probability


class Faults:
    """The rules in force, oldest first."""

    def __init__(self, routes: Collection[str], kinds: Collection[str]) -> None:
        self._routes = frozenset(routes)
        self._kinds = frozenset(kinds)
        self.armed: list[Armed] = []

    def add(self, body: bytes) -> int:
        """Arms a rule, or a list of them, from JSON; returns how many. Raises ValueError saying what is wrong."""
        try:
            told = msgspec.json.decode(body, type=list[Rule] | Rule)
        except msgspec.MsgspecError as error:
            raise ValueError(str(error)) from error
        rules = told if isinstance(told, list) else [told]
        for rule in rules:
            if rule.kind not in self._kinds:
                raise ValueError(f"kind {rule.kind!r} is not one of {', '.join(sorted(self._kinds))}")
            if rule.route != "*" and rule.route not in self._routes:
                raise ValueError(f"route {rule.route!r} is not one of *, {', '.join(sorted(self._routes))}")
        if len(self.armed) + len(rules) > _RULES_MOST:
            raise ValueError(f"more than {_RULES_MOST} rules; DELETE /admin/faults first")
        self.armed += [Armed(rule) for rule in rules]
        return len(rules)

    def clear(self) -> None:
        self.armed = []

    def due(self, route: str) -> list[Armed]:
        """The rules that concern this request: all its delays and partial failures, and the first other one."""
        if not self.armed:
            return []
        due: list[Armed] = []
        ended = False
        for armed in self.armed:
            ending = armed.rule.kind not in {"delay", "partial"}
            if (ending and ended) or not armed.fires(route):
                continue
            ended = ended or ending
            due.append(armed)
        return due

    def listed(self) -> list[dict[str, object]]:
        return [{**msgspec.to_builtins(armed.rule), "fired": armed.fired} for armed in self.armed]
