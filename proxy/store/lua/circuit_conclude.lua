-- conclude: how a probe ended.
-- ARGV[2] name, ARGV[3] process, ARGV[4] number (0: sent while the store was away), ARGV[5] outcome,
-- ARGV[6] milliseconds that the circuit stays open after a failure, ARGV[7] generation that the process knows
local name, process, number, outcome = ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]
local open_ms, generation = tonumber(ARGV[6]), tonumber(ARGV[7])
local record = load(name)
if not record then return answer(fresh(generation)) end
if now < record.c - 1000 and expire(record) then keep(name, record) end
if number == 0 then
  if outcome == 'success' and generation == record.g and record.s ~= 'closed' and not record.h then
    close(record)
    keep(name, record)
  end
  return answer(record)
end
if record.o ~= process or record.n ~= number then return answer(record) end
record.o, record.c = '', now
if record.p == record.g and record.s ~= 'closed' then
  if outcome == 'success' then
    close(record)
  elseif outcome == 'failure' and now >= record.u then
    record.k = record.k + 1
    record.u = now + grown(open_ms, record.k)
    step(record, 'open')
  else
    step(record, 'open')
  end
end
keep(name, record)
return answer(record)
