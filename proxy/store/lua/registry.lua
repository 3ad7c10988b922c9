-- What the verbs on keys share. All keys stand in one hash, under their ids; the field `stamp` beside them names the
-- state of the whole: `<life> <number of changes> <nonce>`. In one Redis key, they come and go together.
--
-- A key is a text of two lines. First: created, expires, revoked (milliseconds, 0 for never), and its secrets, the
-- newest first, each as digest:until with commas between. Then, as JSON, what never changes.
--
--   KEYS[1] the hash
--   ARGV[1] wall milliseconds or 0, ARGV[2] id of the key, ARGV[3] a nonce
-- Answers K (the key, which is as asked now), or one letter for why not.
local call, match, format = redis.call, string.match, string.format

local function whole(text)
  local number = tonumber(text)
  if not number or number < 0 or number > 9007199254740991 or number ~= math.floor(number) then
    error('bw: not a number of milliseconds')
  end
  return number
end

local now = whole(ARGV[1])
if now == 0 then
  local time = call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end

local function read()
  local text = call('HGET', KEYS[1], ARGV[2])
  if not text then return nil end
  local created, expires, revoked, secrets, rest = match(text, '^(%d+) (%d+) (%d+) ([%x:,]*)\n(.*)$')
  if not created then error('bw: not a key') end
  return {text = text, created = created, expires = whole(expires), revoked = whole(revoked), secrets = secrets,
    rest = rest}
end

local function write(key)
  -- Removed first: with that a script may go on although memory is full, and a key can be revoked at any time.
  call('HDEL', KEYS[1], ARGV[2])
  local text = format('%s %.0f %.0f %s\n%s', key.created, key.expires, key.revoked, key.secrets, key.rest)
  call('HSET', KEYS[1], ARGV[2], text)
  local life, count = match(call('HGET', KEYS[1], 'stamp') or '', '^(%S+) (%d+) ')
  call('HSET', KEYS[1], 'stamp', format('%s %.0f %s', life or ARGV[3], (tonumber(count) or 0) + 1, ARGV[3]))
  return 'K' .. text
end
