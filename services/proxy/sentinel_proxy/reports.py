"""What an account holds, told to its owner (`GET /v1/usage`) and to support. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentinel_shared.accounts import AccountView, WindowPolicy


def usage_report(view: AccountView, window: WindowPolicy) -> dict[str, Any]:
    """The caller's limits as the next decision sees them: `limit` null is unlimited, one Zion lacks is left out."""
    return {
        "object": "usage",
        "limits": [
            {
                "name": state.name,
                "limit": state.limit,
                "used": state.used,
                "reserved": state.reserved,
                "remaining": state.remaining,
                "reset_period": period,
                "reset_at": state.period_end_s,
            }
            for state, period in zip(view.limits, view.reset_periods, strict=True)
        ],
        "window": {
            "seconds": window.window_ms // 1000,
            "requests": _window_part(window.requests, view.window_requests),
            "tokens": _window_part(window.tokens, view.window_tokens),
        },
    }


def support_report(external_id: str, view: AccountView, window: WindowPolicy) -> dict[str, Any]:
    """The same with what is on its way to Zion, and how old what is known of Zion is."""
    report = usage_report(view, window)
    for limit, (base, pending, inflight, dead) in zip(report["limits"], view.ledger, strict=True):
        limit |= {"base": base, "pending": pending, "inflight": inflight, "dead": dead}
    return report | {
        "object": "account",
        "external_id": external_id,
        "epoch": view.epoch,
        "limits_age_seconds": (view.now_ms - view.committed_ms) / 1000,
        "fresh": view.now_ms < view.fresh_until_ms,
        "stale_until": view.stale_until_ms // 1000,
        "batch_in_flight": view.batch_id or None,
    }


def _window_part(limit: int, used: int) -> dict[str, int | None]:
    return {"limit": limit or None, "used": used, "remaining": max(0, limit - used) if limit else None}
