-- The account's ledger: 47 little-endian doubles in the hash field "ledger" (the script `read` spells them out). Text fields
-- cost twice the CPU of the whole script. Doubles are exact up to 2^53.
--   1 epoch   2 fresh until   3 stale until   4 last seen   5 expires when idle (0, 1)   6 last committed (all ms)
--   7 window bucket   8 requests now   9 tokens now   10 requests in the twelve buckets before   11 tokens before
--   12-23, 24-35, 36-47  the limits ai_requests, ai_input_tokens, ai_output_tokens, twelve numbers each:
local LIMIT, BASE, PENDING, INFLIGHT, DEAD, RESERVED = 0, 1, 2, 3, 4, 5
local PERIOD_START, PERIOD_END, NEXT_END, WAITING, PERIOD, ACKED = 6, 7, 8, 9, 10, 11
-- limit -1 unlimited, -2 absent; periods in Unix s, 0 none; waiting 1: rolled over, no snapshot of the new period yet;
-- acked: all that Zion has ever confirmed here; period 0 null, 1 DAILY, 2 WEEKLY, 3 MONTHLY, 4 NEVER.   used = base + pending + inflight + dead
local EPOCH, FRESH, STALE, SEEN, EXPIRES, COMMITTED = 1, 2, 3, 4, 5, 6
local NAMES = {'ai_requests', 'ai_input_tokens', 'ai_output_tokens'}
local LEDGER = '<ddddddddddddddddddddddddddddddddddddddddddddddd'

local function used(a, at)
  return a[at + BASE] + a[at + PENDING] + a[at + INFLIGHT] + a[at + DEAD]
end

-- Nothing is owed, promised or credited: the account may expire when idle.
local function quiet(a)
  for at = 12, 36, 12 do
    if a[at + PENDING] ~= 0 or a[at + INFLIGHT] ~= 0 or a[at + DEAD] ~= 0 or a[at + RESERVED] ~= 0 then
      return false
    end
  end
  return true
end

-- An account at rest lives on as long as its limits may serve, and as the longest sliding window remembers (a day).
local function rest(account, a, now_ms)
  redis.call('PEXPIRE', account, math.max(a[STALE] - now_ms, 86400000))
end

-- The first script to meet a period's end starts the new period at 0; what is still on its way to Zion stays counted.
local function roll_over(a, at, now_s)
  while a[at + PERIOD_END] > 0 and now_s >= a[at + PERIOD_END] do
    a[at + BASE] = 0
    a[at + PERIOD_START], a[at + PERIOD_END], a[at + NEXT_END] = a[at + PERIOD_END], a[at + NEXT_END], 0
    a[at + WAITING] = 1
    a[FRESH] = 0
  end
end
