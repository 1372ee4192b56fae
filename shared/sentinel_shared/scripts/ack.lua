-- Zion's word on a batch: what was applied becomes base, what certainly was not goes back to pending, what never will be waits
-- in the dead letters. A batch that is not there any more was acknowledged before: no effect.
-- KEYS  1 queue   2 batches   3 the batch   4 dead letters   5 tallies
-- ARGV  1 batch id   2 what an account's key begins with
--       then per item: external id, number of the limit (1-3), amount, outcome (1 applied, 0 not applied, -1 never), new value or '', reason
-- Returns 1, or 0 when it was acknowledged before.
--@ _account
local claimed_ms = redis.call('HGET', KEYS[3], 'claimed_ms')
if not claimed_ms then
  return 0
end
local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(time[2] / 1000)
local sent_tokens = 0

local function finish(account, ext, a)
  local owed, idle = false, quiet(a)
  for i = 1, 3 do
    owed = owed or a[12 * i + PENDING] > 0
  end
  a[EXPIRES] = idle and 1 or 0
  redis.call('HSET', account, 'ledger', struct.pack(LEDGER, unpack(a, 1, 47)))
  redis.call('HDEL', account, 'batch')
  if owed then
    redis.call('ZADD', KEYS[1], 'LT', now_ms, ext)
  elseif idle then
    rest(account, a, now_ms)
  end
end

local account, ext, a
for j = 3, #ARGV, 6 do
  if ARGV[j] ~= ext then
    if a then
      finish(account, ext, a)
    end
    ext = ARGV[j]
    account = ARGV[2] .. ext
    local ledger = redis.call('HGET', account, 'ledger')
    a = ledger and {struct.unpack(LEDGER, ledger)}
  end
  local i, amount, outcome = tonumber(ARGV[j + 1]), tonumber(ARGV[j + 2]), ARGV[j + 3]
  local at = 12 * i
  if outcome == '1' and i > 1 then
    sent_tokens = sent_tokens + amount
  end
  if a then
    roll_over(a, at, now_s)
    a[at + INFLIGHT] = math.max(0, a[at + INFLIGHT] - amount)
    if outcome == '1' then
      a[at + ACKED] = a[at + ACKED] + amount
      -- Zion's own figure, if it is surely of this period: claimed in it, and a snapshot of it has been seen
      if ARGV[j + 4] ~= '' and a[at + WAITING] == 0 and tonumber(claimed_ms) >= a[at + PERIOD_START] * 1000 then
        a[at + BASE] = tonumber(ARGV[j + 4])
      else
        a[at + BASE] = a[at + BASE] + amount
      end
    elseif outcome == '0' then
      a[at + PENDING] = a[at + PENDING] + amount
    else
      a[at + DEAD] = a[at + DEAD] + amount
    end
  end
  if outcome == '-1' then
    redis.call('HSET', KEYS[4], ARGV[1] .. '-' .. (j - 3) / 6, string.format(
      '{"external_id":%s,"limit_name":"%s","amount":%d,"since_ms":%d,"reason":%s}',
      cjson.encode(ext), NAMES[i], amount, now_ms, cjson.encode(ARGV[j + 5])))
  end
end
if a then
  finish(account, ext, a)
end
redis.call('HINCRBY', KEYS[5], 'sent_tokens', sent_tokens)
redis.call('DEL', KEYS[3])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
