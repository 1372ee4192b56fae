-- A sign of life for a long request: its lease starts anew, and the output seen so far is what a reap would charge.
-- KEYS  1 account   2 leases
-- ARGV  1 rid   2 external id   3 lease, ms   4 output tokens seen so far
-- Returns 1, or 0 when the reservation is gone (settled, or reaped after a stall; the settlement will correct it).
local text = redis.call('HGET', KEYS[1], 'r:' .. ARGV[1])
if not text then
  return 0
end
local time = redis.call('TIME')
local deadline_ms = time[1] * 1000 + math.floor(time[2] / 1000) + ARGV[3]
local _, bucket, input, granted, output = struct.unpack('<dddddd', text)
redis.call('HSET', KEYS[1], 'r:' .. ARGV[1], struct.pack('<dddddd', deadline_ms, bucket, input, granted, output, ARGV[4]))
redis.call('ZADD', KEYS[2], deadline_ms, ARGV[1] .. ' ' .. ARGV[2])
return 1
