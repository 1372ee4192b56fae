-- Freezes what a shard's users owe into one batch: pending becomes inflight, and the very bytes to be posted are kept under the
-- batch's id until Zion's answer is known. At most one batch is in flight per user. The batch comes leased to its claimer.
-- KEYS  1 queue   2 batches   3 the batch
-- ARGV  1 batch id   2 what an account's key begins with   3 users at most   4 items at most   5 lease, ms
--       6 how long usage may gather, ms   7 as many users do not wait for that
-- Returns {} when there is nothing to send yet, else { body, items, claimed at (ms) }
--@ _account
local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(time[2] / 1000)
local dirty = redis.call('ZRANGE', KEYS[1], 0, ARGV[3] - 1, 'WITHSCORES')
if #dirty == 0 or (tonumber(dirty[2]) > now_ms - ARGV[6] and #dirty / 2 < tonumber(ARGV[7])) then
  return {}
end
local items = {}
for u = 1, #dirty, 2 do
  local ext = dirty[u]
  local account = ARGV[2] .. ext
  local f = redis.call('HMGET', account, 'ledger', 'batch')
  if #items + 3 > tonumber(ARGV[4]) and #items > 0 then
    break
  end
  if f[1] and not f[2] then
    local a = {struct.unpack(LEDGER, f[1])}
    local before = #items
    for i = 1, 3 do
      local at = 12 * i
      local amount = a[at + PENDING]
      if amount > 0 then -- a credit waits until new usage outweighs it: Zion takes no negative amounts
        roll_over(a, at, now_s)
        a[at + PENDING] = 0
        a[at + INFLIGHT] = a[at + INFLIGHT] + amount
        items[#items + 1] = string.format('{"externalId":%s,"limitName":"%s","amount":%d}', cjson.encode(ext), NAMES[i], amount)
      end
    end
    if #items > before then
      redis.call('HSET', account, 'ledger', struct.pack(LEDGER, unpack(a, 1, 47)), 'batch', ARGV[1])
    elseif a[EXPIRES] == 0 and quiet(a) then -- corrected to nothing: no ack will come to let the account expire
      a[EXPIRES] = 1
      redis.call('HSET', account, 'ledger', struct.pack(LEDGER, unpack(a, 1, 47)))
      rest(account, a, now_ms)
    end
  end
  redis.call('ZREM', KEYS[1], ext) -- whoever has a batch in flight is put back by its ack
end
if #items == 0 then
  return {}
end
local body = '{"increments":[' .. table.concat(items, ',') .. ']}'
redis.call('HSET', KEYS[3], 'body', body, 'items', #items, 'claimed_ms', now_ms, 'attempts', 1)
redis.call('ZADD', KEYS[2], now_ms + ARGV[5], ARGV[1])
return {body, #items, now_ms}
