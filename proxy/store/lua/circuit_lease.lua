-- lease: the one probe of a circuit, for a process that knows the record as it is.
-- ARGV[2] name, ARGV[3] process, ARGV[4] generation that it knows, ARGV[5] 1: before its time, ARGV[6] milliseconds
-- Answers {now, number} or {now, record}.
local name, process, generation = ARGV[2], ARGV[3], tonumber(ARGV[4])
local early, lease_ms = ARGV[5] == '1', tonumber(ARGV[6])
local record = load(name) or fresh(generation)
local expired, caught_up = expire(record), catch_up(record, generation)
local mine = record.o == process
local waits = early and not mine and now < record.l + EARLY or not early and record.s == 'open' and now < record.u
if record.o ~= '' and not mine or record.h or generation ~= record.g or waits then
  if expired or caught_up then keep(name, record) end
  return answer(record)
end
record.o, record.n, record.e = process, max(record.n + 1, now), now + lease_ms
record.p, record.l = record.g, now
step(record, record.s == 'closed' and 'closed' or 'half_open')
keep(name, record)
return cjson.encode({now = now, number = record.n})
