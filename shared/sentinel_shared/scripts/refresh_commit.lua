-- Zion's answer about a user's limits becomes the account's, unless another one was committed since `refresh_begin`: a late answer
-- must not bring old limits back. What was acknowledged since then may or may not be in the answer's `used`: see below.
-- KEYS  1 account   2 due
-- ARGV  1 external id   2 epoch at the begin (-1: the account was not there)   3 fresh for, ms   4 stale after that for, ms
--       5 next refresh in, ms
--       then for each of the three limits: limit (-1 unlimited, -2 absent), used, period (0-4), period start s (0 none),
--       period end s (0 never), the end after that s (0 unknown), confirmed at the begin
-- Returns 1 committed   0 overtaken by a newer answer: no effect   2 committed but for limits whose period was over in the answer
--@ _account
local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(time[2] / 1000)
local ledger = redis.call('HGET', KEYS[1], 'ledger')
local a, known
if ledger then
  a, known = {struct.unpack(LEDGER, ledger)}, true
  if a[EPOCH] ~= tonumber(ARGV[2]) then
    return 0
  end
else
  if ARGV[2] ~= '-1' then
    return 0
  end
  a = {}
  for i = 1, 47 do
    a[i] = 0
  end
end
local outcome = 1
local due_ms = now_ms + ARGV[5]
local regular_ms = due_ms
for i = 1, 3 do
  local at, arg = 12 * i, 7 * i - 1
  local limit, period_end = tonumber(ARGV[arg]), tonumber(ARGV[arg + 4])
  if known then
    roll_over(a, at, now_s)
  end
  a[at + LIMIT] = limit
  a[at + PERIOD] = tonumber(ARGV[arg + 2])
  if period_end > 0 and now_s >= period_end then
    -- An answer about a period that is over: its `used` is not this period's. Ask again soon, ever less often.
    if not known then
      a[at + BASE] = 0
    end
    if a[at + PERIOD_END] <= now_s then
      a[at + PERIOD_START], a[at + PERIOD_END], a[at + NEXT_END] = period_end, tonumber(ARGV[arg + 5]), 0
      if a[at + PERIOD_END] <= now_s then
        a[at + PERIOD_END] = 0
      end
    end
    a[at + WAITING] = 1
    outcome = 2
    due_ms = math.min(due_ms, now_ms + math.max(2000, (now_s - period_end) * 1000))
  else
    -- Both what was known and the answer plus all that was acknowledged since the begin hold every unit that Zion has of ours;
    -- the smaller one does, too. The answer itself is the least that anybody has used.
    local answer = tonumber(ARGV[arg + 1])
    local since = a[at + ACKED] - ARGV[arg + 6]
    local base = a[COMMITTED] > 0 and a[at + BASE] or math.huge -- a bare account knows nothing of what was used before it
    a[at + BASE] = since > 0 and math.max(answer, math.min(base, answer + since)) or answer
    a[at + PERIOD_START], a[at + PERIOD_END], a[at + NEXT_END] = tonumber(ARGV[arg + 3]), period_end, tonumber(ARGV[arg + 5])
    a[at + WAITING] = 0
    if period_end > 0 then
      due_ms = math.min(due_ms, period_end * 1000)
      if now_s - a[at + PERIOD_START] < 2 then -- once more when Zion has surely turned to the new period
        due_ms = math.min(due_ms, a[at + PERIOD_START] * 1000 + 2000)
      end
    end
  end
end
a[EPOCH] = a[EPOCH] + 1
-- limits-sync refreshes ahead; only where it should have and did not, a request finds the limits not fresh any more
a[FRESH] = math.min(now_ms + ARGV[3], due_ms < regular_ms and due_ms + 1500 or now_ms + ARGV[3])
a[STALE] = now_ms + ARGV[3] + ARGV[4]
a[COMMITTED] = now_ms
if not known then
  a[SEEN] = now_ms
end
local idle = quiet(a)
a[EXPIRES] = idle and 1 or 0
redis.call('HSET', KEYS[1], 'ledger', struct.pack(LEDGER, unpack(a, 1, 47)))
if idle then
  rest(KEYS[1], a, now_ms)
else
  redis.call('PERSIST', KEYS[1])
end
-- Whoever is refreshed is leased, so due later than now; due by now means marked meanwhile, perhaps after Zion answered.
local marked_ms = known and tonumber(redis.call('ZSCORE', KEYS[2], ARGV[1]) or math.huge)
if not marked_ms or marked_ms > now_ms then
  redis.call('ZADD', KEYS[2], math.max(due_ms, now_ms + 500), ARGV[1])
end
return outcome
