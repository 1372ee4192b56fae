-- Reservations whose lease ran out: their proxy died. The request is charged as far as it is known: itself, the estimated
-- input, the output last seen. A tombstone remembers the charge, so that a settlement that comes after all corrects it.
-- What was settled before its admission came (given up for lost, by another connection) is charged nothing more.
-- KEYS  1 leases   2 queue   3 audit   4 tallies
-- ARGV  1 what an account's key begins with   2 what a tombstone's key begins with   3 tombstone's life, s   4 at most   5 audit cap
--       6 what a settlement's marker begins with
-- Returns how many were reaped.
--@ _account
local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(time[2] / 1000)
local expired = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now_ms, 'LIMIT', 0, ARGV[4])
local reaped = 0
for _, member in ipairs(expired) do
  local rid, ext = string.match(member, '^(%S+) (.*)$')
  local account = ARGV[1] .. ext
  local f = redis.call('HMGET', account, 'ledger', 'r:' .. rid)
  if f[1] and f[2] then
    local a = {struct.unpack(LEDGER, f[1])}
    local _, _, input, _, output, seen = struct.unpack('<dddddd', f[2])
    local promised, charge, tokens = {1, input, output}, {1, input, seen}, 0
    local settled = redis.call('EXISTS', ARGV[6] .. rid) == 1
    if settled then
      charge = {0, 0, 0}
    end
    for i = 1, 3 do
      local at = 12 * i
      roll_over(a, at, now_s)
      a[at + RESERVED] = math.max(0, a[at + RESERVED] - promised[i])
      if a[at + LIMIT] > -2 then
        a[at + PENDING] = a[at + PENDING] + charge[i]
        tokens = tokens + (i > 1 and charge[i] or 0)
      else
        charge[i] = 0
      end
    end
    redis.call('HSET', account, 'ledger', struct.pack(LEDGER, unpack(a, 1, 47)))
    redis.call('HDEL', account, 'r:' .. rid)
    redis.call('ZADD', KEYS[2], 'LT', now_ms, ext)
    if not settled then
      redis.call('SET', ARGV[2] .. rid, struct.pack('<ddd', unpack(charge)), 'EX', ARGV[3])
      redis.call('HINCRBY', KEYS[4], 'settled_tokens', tokens)
      redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[5], '*', 'event', cjson.encode({rid = rid, external_id = ext,
        outcome = 'reaped', input_tokens = charge[2], output_tokens = charge[3]}))
    end
    reaped = reaped + 1
  end
  redis.call('ZREM', KEYS[1], member)
end
return reaped
