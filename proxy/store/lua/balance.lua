-- balance: the figures of scopes.
-- KEYS[4...] scopes
-- Answers B (epoch, rows), C cold (numbers of the unknown scopes).
if not is_open then return 'C' end
reap()
local scopes, missing = load_all(4, #KEYS)
flush()
if not scopes then return 'C' .. missing end
return 'B' .. pack('<l', epoch) .. rows(scopes)
