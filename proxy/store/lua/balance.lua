-- balance: the figures of scopes.
-- KEYS[4...] scopes
-- Answers B (epoch, rows), C cold (numbers of the unknown scopes).
local is_open = read_clock(ARGV[1])
if not is_open then return 'C' end
reap()
local scopes, missing = load_all(4)
flush()
if not scopes then return 'C' .. missing end
return 'B' .. pack('<l', epoch) .. rows(scopes)
