-- May this request run? If so, promise it what it may cost, in one step that every replica sees.
-- KEYS  1 account   2 leases   3 due
-- ARGV  1 rid   2 external id   3 input tokens, estimated   4 output tokens the client allows (-1: it did not say, 0: none)
--       5 output tokens the model can give   6 choices (n)   7 lease, ms
--       8 window, ms (0: off)   9 requests per window (0: off)   10 tokens per window (0: off)
-- Returns { code, granted output (-1: uncapped), binding, wait ms (-1: for ever), now ms, refresh hint, age of the limits ms,
--           limit, used, reserved, period end s  (x3, limit -1 unlimited, -2 absent),  window requests, window tokens }
--   code     1 admitted   0 denied   -1 account unknown or beyond its maximum staleness (nothing else is returned)
--   binding  when denied: 1-3 the limit is used up, 11-13 it is only promised to requests that run now,
--            4 requests per window, 5 tokens per window
-- A denied request changes nothing. The same rid again gets the same grant.
--@ _account
--@ _window
local account, rid = KEYS[1], ARGV[1]
local f = redis.call('HMGET', account, 'ledger', 'r:' .. rid)
if not f[1] then
  return {-1}
end
local a = {struct.unpack(LEDGER, f[1])}
local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(time[2] / 1000)
if now_ms >= a[STALE] then
  return {-1}
end
local input, wanted, choices = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[6])
local window_ms, window_requests, window_tokens = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local kept

local function reply(code, granted, binding, wait_ms)
  return {code, granted, binding, wait_ms, now_ms, now_ms >= a[FRESH] and 1 or 0, now_ms - a[COMMITTED],
    a[12], used(a, 12), a[17], a[19], a[24], used(a, 24), a[29], a[31], a[36], used(a, 36), a[41], a[43],
    a[W + 1] + a[W + 3], a[W + 2] + a[W + 4]}
end

if f[2] then
  local _, _, _, granted = struct.unpack('<dddd', f[2])
  return reply(1, granted, 0, 0)
end

-- What is there for output: the scarcer of the subscription and the token window; nil = nothing limits it.
local available
local costs = {1, input, 0}
for i = 1, 3 do
  local at = 12 * i
  if a[at + PERIOD_END] > 0 and now_s >= a[at + PERIOD_END] then
    roll_over(a, at, now_s)
  end
  if a[at + LIMIT] >= 0 then
    local left = a[at + LIMIT] - used(a, at)
    local least = costs[i]
    if i == 3 and wanted ~= 0 then
      available = left - a[at + RESERVED]
      least = choices
    end
    if left < least then
      return reply(0, 0, i, a[at + PERIOD_END] > 0 and a[at + PERIOD_END] * 1000 - now_ms or -1)
    elseif left - a[at + RESERVED] < least then
      return reply(0, 0, 10 + i, 1000)
    end
  end
end

if window_ms > 0 then
  kept = turn(account, a, math.floor(now_ms * BUCKETS / window_ms))

  -- How long until the window has room for `more` of column 1 (requests) or 2 (tokens).
  local function wait_ms(column, limit, more)
    local h = kept or history_of(account)
    local sum = a[W + column] + a[W + 2 + column]
    local turns = 0
    while sum + more > limit and turns < BUCKETS do
      turns = turns + 1
      sum = sum - h[2 * turns - 2 + column]
    end
    if sum + more > limit then
      turns = BUCKETS + 1
    end
    return math.max(1, math.ceil((a[W] + turns) * window_ms / BUCKETS) - now_ms)
  end

  if window_requests > 0 and a[W + 1] + a[W + 3] + 1 > window_requests then
    return reply(0, 0, 4, wait_ms(1, window_requests, 1))
  end
  if window_tokens > 0 then
    local room = window_tokens - a[W + 2] - a[W + 4] - input
    local least = wanted ~= 0 and choices or 0
    if room < least then
      return reply(0, 0, 5, wait_ms(2, window_tokens, input + least))
    end
    if wanted ~= 0 and (not available or room < available) then
      available = room
    end
  end
end

local granted = -1
if wanted == 0 then
  granted = 0
elseif available then
  local model_max = tonumber(ARGV[5])
  if wanted > 0 then
    granted = math.min(wanted, available)
  elseif available >= model_max then
    granted = model_max
  else
    granted = math.max(math.floor(available / 2), math.min(256, available))
  end
  granted = math.max(granted - granted % choices, choices)
end

-- Promise it.
costs[3] = math.max(granted, 0)
for i = 1, 3 do
  a[12 * i + RESERVED] = a[12 * i + RESERVED] + costs[i]
end
if window_ms > 0 then
  a[W + 1] = a[W + 1] + 1
  a[W + 2] = a[W + 2] + input + costs[3]
end
if a[EXPIRES] == 1 then
  redis.call('PERSIST', account)
  a[EXPIRES] = 0
end
if now_ms - a[SEEN] > 10000 then
  redis.call('ZADD', KEYS[3], 'NX', a[FRESH], ARGV[2])
end
a[SEEN] = now_ms
local deadline_ms = now_ms + ARGV[7]
redis.call('HSET', account, 'ledger', struct.pack(LEDGER, unpack(a, 1, 47)),
  'r:' .. rid, struct.pack('<dddddd', deadline_ms, window_ms > 0 and a[W] or 0, input, granted, costs[3], 0))
if kept then
  redis.call('HSET', account, 'window_history', table.concat(kept, ' '))
end
redis.call('ZADD', KEYS[2], deadline_ms, rid .. ' ' .. ARGV[2])
return reply(1, granted, 0, 0)
