-- Whose limits are due for a refresh: leases them by pushing their due time, so that a replica that dies gives them back.
-- Users idle for long are taken off the list; their next request puts them on it again.
-- KEYS  1 due
-- ARGV  1 what an account's key begins with   2 at most   3 lease, ms   4 idle after, ms
-- Returns the external ids.
--@ _account
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local r = {}
for _, ext in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now_ms, 'LIMIT', 0, ARGV[2])) do
  local ledger = redis.call('HGET', ARGV[1] .. ext, 'ledger')
  local a = ledger and {struct.unpack(LEDGER, ledger)}
  if a and now_ms - a[SEEN] <= tonumber(ARGV[4]) then
    redis.call('ZADD', KEYS[1], now_ms + ARGV[3], ext)
    r[#r + 1] = ext
  else
    redis.call('ZREM', KEYS[1], ext)
  end
end
return r
