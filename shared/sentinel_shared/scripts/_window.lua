-- The sliding window of an account: twelve sub-buckets and the current one, the oldest counted in full (`W` on: see _account).
-- `bucket` counts twelfths of the window since 1970. The twelve before the current one stand in the field "window_history",
-- oldest first, "<requests> <tokens>" each; their sums are in the ledger, so that only a new bucket reads them.
local BUCKETS, W = 12, 7

local function history_of(account)
  local h = {}
  for n in string.gmatch(redis.call('HGET', account, 'window_history') or '', '%S+') do
    h[#h + 1] = tonumber(n)
  end
  for i = #h + 1, 2 * BUCKETS do
    h[i] = 0
  end
  return h
end

-- Turns the ring to `bucket`. Returns the history if it was read or changed on the way.
local function turn(account, a, bucket)
  local gone = bucket - a[W]
  if gone <= 0 and gone >= -BUCKETS then
    return nil -- the same bucket, or the clock stepped back a little: nothing is forgotten early
  end
  local kept, requests, tokens = {}, 0, 0
  local h = gone > 0 and gone <= BUCKETS and history_of(account) or {}
  if #h > 0 then
    h[#h + 1], h[#h + 2] = a[W + 1], a[W + 2]
  end
  for i = 1, 2 * BUCKETS, 2 do -- what stood `gone` buckets further on; nothing, where the ring has turned past it
    local r, t = h[i + 2 * gone] or 0, h[i + 2 * gone + 1] or 0
    kept[i], kept[i + 1] = r, t
    requests, tokens = requests + r, tokens + t
  end
  a[W], a[W + 1], a[W + 2], a[W + 3], a[W + 4] = bucket, 0, 0, requests, tokens
  return kept
end
