-- What the verbs of circuits share: the time, and the record of one circuit. The same steps as proxy/fault_tolerance/
-- fleet.py, where the words stand and the reasons.
--
--   KEYS[1] hash of processes: when each came and when it is given up, KEYS[2] hash of records by provider/model
--   ARGV[1] wall milliseconds, or 0 for the server's own
--
-- A record is JSON: s state, g generation, c changed, u due, k reopened, x closed at, h by hand, w why, v votes,
-- o owner of the probe, n its number, e when its lease ends, p its generation, l when the last probe began. A verb
-- answers with the record, or with an object of its own, and always with the time: times leave the store as spans.
local call, max, min, floor, format = redis.call, math.max, math.min, math.floor, string.format
local FLAPS, EARLY, KEPT, QUORUM, SETTLED = 60000, 1000, 3600000, 2, 1000
local GROWTH, MOST = 1.25, 1.6

local now = tonumber(ARGV[1])
if now == 0 then
  local time = call('TIME')
  now = time[1] * 1000 + floor(time[2] / 1000)
end

local function fresh(generation)
  return {s = 'closed', g = generation, c = 0, u = 0, k = 0, x = -1, h = false, w = {}, v = {},
    o = '', n = 0, e = 0, p = 0, l = 0}
end

-- What cannot be read is no record: a circuit is nothing that could not be found out again.
local function read(raw)
  local readable, record = pcall(cjson.decode, raw)
  return readable and type(record) == 'table' and record.s and record or nil
end

local function load(name)
  local raw = call('HGET', KEYS[2], name)
  return raw and read(raw)
end

local function keep(name, record)
  call('HSET', KEYS[2], name, cjson.encode(record))
end

local function grown(open_ms, reopened)
  return floor(open_ms * min(GROWTH ^ min(reopened, 16), MOST))
end

local function step(record, state)
  record.s, record.c = state, now
end

local function move(record, state)
  record.g = max(record.g + 1, now)
  step(record, state)
end

local function close(record)
  move(record, 'closed')
  record.v, record.w, record.x = {}, {}, now
end

-- A probe that nobody has any more leaves an open circuit open, and a closed one closed.
-- Where the clock went back, what was to last for seconds must not last for as long as that.
local function expire(record)
  local stepped = now < record.c - 1000
  if stepped then record.e, record.u, record.l, record.c = 0, 0, 0, now end
  if record.o == '' or now < record.e then return stepped end
  record.o = ''
  step(record, record.s == 'closed' and 'closed' or 'open')
  return true
end

-- The store lost the record, and somebody who knew less than this process began it anew.
local function catch_up(record, generation)
  if record.s ~= 'closed' or generation <= record.g then return false end
  record.g = generation
  return true
end

local function answer(record)
  return cjson.encode({now = now, record = record})
end
