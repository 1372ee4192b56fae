"""The Redis lane: one connection per server, the commands of one loop tick in one write, every wait bounded."""

from sentinel_shared.redis_lane.connection import LaneStats
from sentinel_shared.redis_lane.lane import RedisLane
from sentinel_shared.redis_lane.replies import Reply
from sentinel_shared.redis_lane.script import Script

__all__ = ["LaneStats", "RedisLane", "Reply", "Script"]
