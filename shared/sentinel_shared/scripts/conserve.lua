-- Do a shard's books balance? What was settled must have been sent, dropped, or still be owed by some account.
-- KEYS  1 queue   2 batches   3 dead letters   4 tallies
-- ARGV  1 what an account's key begins with   2 what a batch's key begins with   3 accounts at most
-- Returns { 1, tokens unaccounted for } (above 0: lost, below: doubled or a credit), { 0, 0 } when there are too many to look at
--@ _account
local owing, count = {}, 0
local function note(ext)
  if not owing[ext] then
    owing[ext] = true
    count = count + 1
  end
end
local most = tonumber(ARGV[3])
if redis.call('ZCARD', KEYS[1]) + 100 * redis.call('ZCARD', KEYS[2]) + redis.call('HLEN', KEYS[3]) > most then
  return {0, 0}
end
for _, ext in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do
  note(ext)
end
for _, id in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  local body = redis.call('HGET', ARGV[2] .. id, 'body')
  for _, item in ipairs(body and cjson.decode(body).increments or {}) do
    note(item.externalId)
  end
end
for _, letter in ipairs(redis.call('HVALS', KEYS[3])) do
  note(cjson.decode(letter).external_id)
end
local owed = 0
for ext in pairs(owing) do
  local ledger = redis.call('HGET', ARGV[1] .. ext, 'ledger')
  if ledger then
    local a = {struct.unpack(LEDGER, ledger)}
    for i = 2, 3 do
      local at = 12 * i
      owed = owed + a[at + PENDING] + a[at + INFLIGHT] + a[at + DEAD]
    end
  end
end
local tallies = redis.call('HMGET', KEYS[4], 'settled_tokens', 'sent_tokens', 'dropped_tokens')
return {1, (tonumber(tallies[1]) or 0) - (tonumber(tallies[2]) or 0) - (tonumber(tallies[3]) or 0) - owed}
