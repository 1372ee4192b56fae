-- Where a refresh starts from; to be called before Zion is asked.
-- KEYS  1 account
-- Returns { epoch (-1: the account is not there), then for each limit all that Zion has ever confirmed }
--@ _account
local ledger = redis.call('HGET', KEYS[1], 'ledger')
if not ledger then
  return {-1, 0, 0, 0}
end
local a = {struct.unpack(LEDGER, ledger)}
return {a[EPOCH], a[12 + ACKED], a[24 + ACKED], a[36 + ACKED]}
