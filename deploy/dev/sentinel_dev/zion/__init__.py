"""A simulated Zion: users, their limits and periods, increments, a ledger that can be read, and faults on demand."""

from sentinel_dev.zion.app import DEMO_API_KEY, DEMO_SECRET, Zion, create_zion
from sentinel_dev.zion.tokens import make_token

__all__ = ["DEMO_API_KEY", "DEMO_SECRET", "Zion", "create_zion", "make_token"]
