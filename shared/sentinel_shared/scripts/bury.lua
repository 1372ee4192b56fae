-- An operator's decision on one dead letter. Replay: it is owed again and goes out in a new batch. Drop: it is forgotten.
-- KEYS  1 dead letters   2 account   3 queue   4 audit   5 tallies
-- ARGV  1 dead-letter id   2 'replay' or 'drop'   3 audit cap
-- Returns 1, or 0 when there is no such letter (any more).
--@ _account
local text = redis.call('HGET', KEYS[1], ARGV[1])
if not text then
  return 0
end
local letter = cjson.decode(text)
local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
local ledger = redis.call('HGET', KEYS[2], 'ledger')
local a
if ledger then
  a = {struct.unpack(LEDGER, ledger)}
else -- its account is gone: a bare one carries the debt; `stale until` 0 makes admit ask Zion
  a = {}
  for i = 1, 47 do
    a[i] = 0
  end
  a[12], a[24], a[36] = -1, -1, -1
end
for i = 1, 3 do
  if NAMES[i] == letter.limit_name then
    local at = 12 * i
    a[at + DEAD] = math.max(0, a[at + DEAD] - letter.amount)
    if ARGV[2] == 'replay' then
      a[at + PENDING] = a[at + PENDING] + letter.amount
      redis.call('ZADD', KEYS[3], 'LT', now_ms, letter.external_id)
    elseif i > 1 then
      redis.call('HINCRBY', KEYS[5], 'dropped_tokens', letter.amount)
    end
  end
end
if ledger or ARGV[2] == 'replay' then
  local idle = quiet(a)
  a[EXPIRES] = idle and 1 or 0
  redis.call('HSET', KEYS[2], 'ledger', struct.pack(LEDGER, unpack(a, 1, 47)))
  if idle then
    rest(KEYS[2], a, now_ms)
  end
end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[3], '*', 'event', cjson.encode({outcome = ARGV[2], dead_letter = letter}))
return 1
