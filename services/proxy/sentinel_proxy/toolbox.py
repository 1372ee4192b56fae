"""What requests under /v1 are served with, and what every one of them needs: who is asking, how a failure is told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sentinel_proxy.auth import bearer_token
from sentinel_proxy.errors import ApiError, upstream_rejected, upstream_timeout, upstream_unreachable, user_not_metered
from sentinel_proxy.upstream import UpstreamError, UpstreamTimeout

if TYPE_CHECKING:
    from sentinel_proxy.auth import Authenticator
    from sentinel_proxy.calibration import Samples
    from sentinel_proxy.exchange import Exchange
    from sentinel_proxy.limiter import Limiter
    from sentinel_proxy.meter import Meter
    from sentinel_proxy.metrics import ProxyMetrics
    from sentinel_proxy.models import Models
    from sentinel_proxy.settings import Settings
    from sentinel_proxy.tokens import Ratios, TokenCounter
    from sentinel_proxy.upstream import Upstream
    from sentinel_shared.contracts import Caller

ACCOUNT_STATUSES: Final = frozenset({401, 402, 403})
"""The upstream's word about the gateway's own account, which is none of the caller's business."""

_log: Final = logging.getLogger(__name__)


@dataclass(slots=True)
class Load:
    """How many requests are running."""

    count: int = 0


@dataclass(frozen=True, slots=True)
class Toolbox:
    """What a request is served with; one per process."""

    settings: Settings
    auth: Authenticator
    limiter: Limiter
    meter: Meter
    upstream: Upstream
    models: Models
    counter: TokenCounter
    ratios: Ratios
    metrics: ProxyMetrics
    new_rid: Callable[[], str]
    samples: Samples
    load: Load


async def authenticate(tools: Toolbox, exchange: Exchange) -> tuple[Caller, str]:
    """The caller and the external id. Raises ApiError: 401, 403, 503."""
    token = bearer_token(exchange.header(b"authorization"))
    caller = tools.auth.remembered(token) or await tools.auth.caller(token)
    if caller.external_id is None:
        raise user_not_metered()
    return caller, caller.external_id


def account_refused(tools: Toolbox, status: int) -> ApiError:
    """The caller's answer where the upstream's has one of ACCOUNT_STATUSES; counted and logged for the operator."""
    tools.metrics.upstream_errors.labels(f"rejected_{status}").inc()
    _log.warning("the upstream refuses the gateway's own account: status %d", status)
    return upstream_rejected()


def as_answer(error: UpstreamError) -> ApiError:
    """What the caller is told."""
    return upstream_timeout() if isinstance(error, UpstreamTimeout) else upstream_unreachable()
