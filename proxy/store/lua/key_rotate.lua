-- key_rotate: a new secret for a key; those before end after the overlap at the latest.
-- ARGV[4] digest of the new secret, ARGV[5] milliseconds of overlap, ARGV[6] how many secrets may be valid at once
-- Answers K, U there is no such key, R it was revoked, E it has expired, F too many secrets are still valid.
local last = now + whole(ARGV[5])
local key = read()
if not key then return 'U' end
if key.revoked > 0 then return 'R' end
if key.expires > 0 and key.expires <= now then return 'E' end
if match(key.secrets, '^%x+') == ARGV[4] then return 'K' .. key.text end -- the same call once more
local secrets = {ARGV[4] .. ':0'}
for digest, ends in string.gmatch(key.secrets, '(%x+):(%d+)') do
  ends = tonumber(ends)
  if ends == 0 or ends > last then ends = last end
  if ends > now then secrets[#secrets + 1] = format('%s:%.0f', digest, ends) end
end
if #secrets > whole(ARGV[6]) then return 'F' end
key.secrets = table.concat(secrets, ',')
return write(key)
