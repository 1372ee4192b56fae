-- An account spelled out. Changes nothing: a period that is over counts as rolled over in the answer only.
-- KEYS  1 account
-- ARGV  1 window, ms (0: off)
-- Returns {} or the ledger's 47 numbers as text, then now ms, the batch in flight or ''
--@ _account
--@ _window
local f = redis.call('HMGET', KEYS[1], 'ledger', 'batch')
if not f[1] then
  return {}
end
local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(time[2] / 1000)
local a = {struct.unpack(LEDGER, f[1])}
for i = 1, 3 do
  roll_over(a, 12 * i, now_s)
end
if tonumber(ARGV[1]) > 0 then
  turn(KEYS[1], a, math.floor(now_ms * BUCKETS / ARGV[1]))
end
a[48] = now_ms -- where `unpack` left the position that it stopped at
local r = {}
for i = 1, #a do
  r[i] = string.format('%d', a[i])
end
r[#r + 1] = f[2] or ''
return r
