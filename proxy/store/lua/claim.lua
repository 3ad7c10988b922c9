-- Books whose object this is, unless it is another tenant's. Answers whose it is from now on.
-- KEYS[1]: the object. ARGV: its owner; the beginning that all owners of this tenant share; milliseconds to keep it.
local known = redis.call('GET', KEYS[1])
if known and string.sub(known, 1, #ARGV[2]) ~= ARGV[2] then
  return known
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return ARGV[1]
