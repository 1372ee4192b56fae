-- A batch that Zion refused as a whole without applying it (400, 413): two halves under new ids, ready to be sent, so that what
-- is wrong with one user's item is found in a few steps. Users stay whole.
-- KEYS  1 batches   2 the batch   3 first half   4 second half
-- ARGV  1 batch id   2, 3 ids of the halves   4 what an account's key begins with   5 items of the first half   6, 7 bodies of the halves
--       8 items of the second half   then the external ids, each followed by 2 or 3: which half it went to
-- Returns 1, or 0 when the batch is not there any more.
local claimed_ms = redis.call('HGET', KEYS[2], 'claimed_ms')
if not claimed_ms then
  return 0
end
for half = 0, 1 do
  redis.call('HSET', KEYS[3 + half], 'body', ARGV[6 + half], 'items', ARGV[half == 0 and 5 or 8], 'claimed_ms', claimed_ms, 'attempts', 0)
  redis.call('ZADD', KEYS[1], 0, ARGV[2 + half])
end
for j = 9, #ARGV, 2 do
  redis.call('HSET', ARGV[4] .. ARGV[j], 'batch', ARGV[tonumber(ARGV[j + 1])])
end
redis.call('DEL', KEYS[2])
redis.call('ZREM', KEYS[1], ARGV[1])
return 1
