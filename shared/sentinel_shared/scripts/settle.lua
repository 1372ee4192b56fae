-- What a request really cost: its reservation out, the actual cost into pending, the account onto the queue towards Zion.
-- KEYS  1 account   2 leases   3 queue   4 audit   5 tallies   6 settled:<rid>   7 reaped:<rid>
-- ARGV  1 rid   2 external id   3 requests   4 input tokens   5 output tokens   6 audit event ('' none)   7 audit cap
--       8 age of the first attempt that may have been applied, ms (0: none)   9 how long settlements are remembered, s
--       10 window, ms (0: off)   11 requests to give back to the window (0, 1)
-- Returns  1 settled   2 corrected after a reap   3 its reservation was lost: charged in full   0 settled before: no effect
-- A refund is a settlement of nothing. Accepted even when Redis is out of memory.
--@ _account
--@ _window
local account, rid, ext = KEYS[1], ARGV[1], ARGV[2]
local costs = {tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])}
local f = redis.call('HMGET', account, 'ledger', 'r:' .. rid)
local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(time[2] / 1000)

local promised, charged, due = {0, 0, 0}, {0, 0, 0}, costs
local outcome, bucket, input, output, _ = 1
if f[2] then
  _, bucket, input, _, output = struct.unpack('<dddddd', f[2])
  promised = {1, input, output}
else
  if redis.call('EXISTS', KEYS[6]) == 1 then
    return 0
  end
  local tombstone = redis.call('GET', KEYS[7])
  if tombstone then
    charged = {struct.unpack('<ddd', tombstone)}
    outcome = 2
    redis.call('DEL', KEYS[7])
  elseif tonumber(ARGV[8]) >= ARGV[9] * 1000 then
    return 0 -- too old to tell; with Redis's data intact it was settled by its first attempt, or reaped
  else
    outcome = 3
  end
  redis.call('PERSIST', account)
end

local a
if f[1] then
  a = {struct.unpack(LEDGER, f[1])}
else -- the account itself was lost: keep what is owed until Zion is asked again; `stale until` 0 makes admit ask
  a = {}
  for i = 1, 47 do
    a[i] = 0
  end
  a[12], a[24], a[36] = -1, -1, -1
end

-- Where no reservation was found, the admission may still come, and is reaped a lease later: an hour at most.
if not redis.call('SET', KEYS[6], '1', 'EX', outcome == 3 and ARGV[9] + 3600 or ARGV[9], 'NX') then
  due = {0, 0, 0} -- its admission, given up for lost, came after it was settled: only the promise is taken back
end

local dirty_ms = now_ms
local owed, tokens_settled = false, 0
for i = 1, 3 do
  local at = 12 * i
  if a[at + PERIOD_END] > 0 then
    roll_over(a, at, now_s)
    if a[at + PERIOD_END] - now_s <= 5 then
      dirty_ms = 0 -- the period is about to end: do not linger
    end
  end
  a[at + RESERVED] = math.max(0, a[at + RESERVED] - promised[i])
  if a[at + LIMIT] > -2 then -- Zion keeps no book for an absent limit
    a[at + PENDING] = a[at + PENDING] + due[i] - charged[i]
    owed = owed or a[at + PENDING] > 0
    if i > 1 then
      tokens_settled = tokens_settled + due[i] - charged[i]
    end
  end
end

local window_ms = tonumber(ARGV[10])
if window_ms > 0 and outcome == 1 then
  local tokens = costs[2] + costs[3] - promised[2] - promised[3]
  local requests = -ARGV[11]
  local kept = turn(account, a, math.floor(now_ms * BUCKETS / window_ms))
  local age = a[W] - bucket
  if age <= 0 then
    a[W + 1], a[W + 2] = math.max(0, a[W + 1] + requests), math.max(0, a[W + 2] + tokens)
  elseif age <= BUCKETS then
    local h = kept or history_of(account)
    local at = 2 * (BUCKETS - age) + 1
    local r, t = math.max(0, h[at] + requests), math.max(0, h[at + 1] + tokens)
    a[W + 3], a[W + 4] = a[W + 3] + r - h[at], a[W + 4] + t - h[at + 1]
    h[at], h[at + 1] = r, t
    kept = h
  end
  if kept then
    redis.call('HSET', account, 'window_history', table.concat(kept, ' '))
  end
end

local idle = not owed and quiet(a)
a[EXPIRES] = idle and 1 or 0
redis.call('HSET', account, 'ledger', struct.pack(LEDGER, unpack(a, 1, 47)))
if outcome == 1 then
  redis.call('HDEL', account, 'r:' .. rid)
  redis.call('ZREM', KEYS[2], rid .. ' ' .. ext)
end
if tokens_settled ~= 0 then
  redis.call('HINCRBY', KEYS[5], 'settled_tokens', tokens_settled)
end
if owed then
  redis.call('ZADD', KEYS[3], 'LT', dirty_ms, ext)
elseif idle then -- a refund: no ack will come to let the account expire
  rest(account, a, now_ms)
end
if due ~= costs then
  return 0
end
if ARGV[6] ~= '' then
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[7], '*', 'event', ARGV[6])
end
return outcome
