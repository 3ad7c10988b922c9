-- key_revoke: ends a key for good.
-- Answers K, A (the key) it was revoked already, U there is no such key.
local key = read()
if not key then return 'U' end
if key.revoked > 0 then return 'A' .. key.text end
key.revoked = now
return write(key)
