-- report: a process lives, has votes and probes, and hears what changed.
-- ARGV[2] process, ARGV[3] for how long it counts as living (0: it leaves), ARGV[4] since when it wants to hear,
-- ARGV[5] milliseconds of a lease, ARGV[6] votes: {name: [generation, open_ms, why, restores]},
-- ARGV[7] probes: [[name, number], ...]
local process, alive, since, lease_ms = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local votes, probes = cjson.decode(ARGV[6]), cjson.decode(ARGV[7])
-- Removed first: with that a script may go on although memory is full.
local came, live, count_live = now, {}, 0
local lives = call('HGETALL', KEYS[1])
for index = 1, #lives, 2 do
  local since_then, till = string.match(lives[index + 1], '(%d+) (%d+)')
  local lives_on = tonumber(till) > now
  if lives_on and lives[index] == process then came = tonumber(since_then) end
  if lives_on and lives[index] ~= process then
    live[lives[index]], count_live = true, count_live + 1
  else
    call('HDEL', KEYS[1], lives[index])
  end
end
if alive > 0 then
  call('HSET', KEYS[1], process, format('%.0f %.0f', came, now + alive))
  live[process], count_live = true, count_live + 1
end
local quorum = (count_live == 1 and now - came >= SETTLED) and 1 or QUORUM

local records, dirty = {}, {}
local all = call('HGETALL', KEYS[2])
for index = 1, #all, 2 do
  local record = read(all[index + 1])
  if record then
    records[all[index]], dirty[all[index]] = record, expire(record)
  else
    call('HDEL', KEYS[2], all[index])
  end
end

local lost = {}
for index = 1, #probes do
  local name, number = probes[index][1], probes[index][2]
  local record = records[name]
  if record and record.o == process and record.n == number then
    record.e, dirty[name] = now + lease_ms, true
  else
    lost[#lost + 1] = probes[index]
  end
end

for name, vote in pairs(votes) do
  if not records[name] then
    local record = fresh(vote[1])
    if vote[4] ~= '' then
      record.h = vote[4] == 'hand'
      step(record, 'open')
      record.u, record.w = now + vote[2], {[process] = vote[3]}
    end
    records[name], dirty[name] = record, true
  end
end

local function vote_on(record, vote)
  local kept, count, changed = {}, 0, false
  local caught_up = vote and catch_up(record, vote[1])
  for who, why in pairs(record.v) do
    if live[who] and who ~= process then
      kept[who], count = why, count + 1
    elseif who ~= process or not vote or vote[3] ~= why then
      changed = true
    end
  end
  local voted = record.v[process]
  record.v = kept
  if vote and vote[1] == record.g and record.s == 'closed' then
    kept[process], count = vote[3], count + 1
    changed = changed or voted ~= vote[3]
    if count >= quorum then
      record.k = (record.x >= 0 and now - record.x < FLAPS) and record.k + 1 or 0
      record.u = now + grown(vote[2], record.k)
      record.w, record.v = kept, {}
      move(record, 'open')
      return true
    end
  elseif voted then
    changed = true
  end
  if changed then record.c = now end
  return changed or caught_up
end

local views = {}
for name, record in pairs(records) do
  local vote = votes[name]
  if vote and vote[4] ~= '' then vote = nil end
  if vote_on(record, vote) then dirty[name] = true end
  if alive == 0 and record.o == process then
    record.e, dirty[name] = now, true
    expire(record)
  end
  if record.s == 'closed' and not next(record.v) and record.o == '' and now - record.c > KEPT then
    call('HDEL', KEYS[2], name)
  else
    if dirty[name] then keep(name, record) end
    if record.c >= since or record.s ~= 'closed' or next(record.v) or record.o ~= '' then views[name] = record end
  end
end
return cjson.encode({now = now, live = count_live, lost = lost, views = views})
