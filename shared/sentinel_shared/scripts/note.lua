-- Writes down how the sending of a batch goes, for whoever leases it next. One that was acknowledged or split meanwhile stays gone.
-- KEYS  1 the batch
-- ARGV  1 field   2 value
-- Returns 1, or 0 when the batch is not there any more.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
return 1
