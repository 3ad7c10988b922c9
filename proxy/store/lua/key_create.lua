-- key_create: a new key.
-- ARGV[4] digest, ARGV[5] milliseconds to live or 0, ARGV[6] what never changes, as JSON, ARGV[7] how many keys there
-- may be, ARGV[8] milliseconds that a key which is over is kept
-- Answers K, F there are too many keys.
local lives = whole(ARGV[5])
local known = read()
if known then
  if match(known.secrets, '^%x+') ~= ARGV[4] then error('bw: another key has this id') end
  return 'K' .. known.text -- the same call once more: its first answer was lost
end
local most, over = whole(ARGV[7]), now - whole(ARGV[8])
local count = call('HLEN', KEYS[1])
if count > most then
  local all, gone = call('HGETALL', KEYS[1]), {}
  for place = 1, #all, 2 do
    local expires, revoked = match(all[place + 1], '^%d+ (%d+) (%d+) ')
    if all[place] ~= 'stamp' and expires then
      expires, revoked = tonumber(expires), tonumber(revoked)
      if (revoked > 0 and revoked <= over) or (expires > 0 and expires <= over) then gone[#gone + 1] = all[place] end
    end
  end
  if count - #gone > most then return 'F' end
  for place = 1, #gone do call('HDEL', KEYS[1], gone[place]) end
end
return write({created = format('%.0f', now), expires = lives > 0 and now + lives or 0, revoked = 0,
  secrets = ARGV[4] .. ':0', rest = ARGV[6]})
