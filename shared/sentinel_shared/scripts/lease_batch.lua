-- A batch whose fate is still open and whose lease or back-off is over: to be sent again, the same bytes under the same id.
-- KEYS  1 batches
-- ARGV  1 what a batch's key begins with   2 lease, ms
-- Returns {} or { batch id, body, claimed at (ms), attempts, the last attempt that surely was not applied, 1 if sent item by item,
--   then index, outcome for each item known already }
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local id = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now_ms, 'LIMIT', 0, 1)[1]
if not id then
  return {}
end
local batch = ARGV[1] .. id
local f = redis.call('HMGET', batch, 'body', 'claimed_ms', 'cleared', 'singles')
if not f[1] then
  redis.call('ZREM', KEYS[1], id)
  return {}
end
redis.call('ZADD', KEYS[1], now_ms + ARGV[2], id)
local r = {id, f[1], f[2], redis.call('HINCRBY', batch, 'attempts', 1), f[3] or '0', f[4] or '0'}
local all = redis.call('HGETALL', batch)
for i = 1, #all, 2 do
  local index = string.match(all[i], '^done:(%d+)$')
  if index then
    r[#r + 1] = index
    r[#r + 1] = all[i + 1]
  end
end
return r
