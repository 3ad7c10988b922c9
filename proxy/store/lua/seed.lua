-- seed: takes over what a process remembers and holds, and opens a store that has collected for long enough.
-- KEYS[4] since when it collects, KEYS[5...] scopes, then reservations
-- ARGV[5] milliseconds to collect, [6] number of scopes, ARGV[7...] for each scope, as doubles: hour, day, month, what
-- was spent in them, and requests, tokens, nano-USD of the last minute; then for each reservation its id and, as doubles:
-- milliseconds of lease, 1 to charge it when it is lost, requests, tokens, nano-USD, and the places of its scopes
-- Answers D (milliseconds still to collect, 1 if this call was the first to reach an empty store).
local collect, told = whole(ARGV[5], MAX_SUM), whole(ARGV[6], #KEYS - 4)
local since = not is_open and call('GET', KEYS[4])
for index = 1, told do
  local key = KEYS[4 + index]
  local known = {unpack_at('<ddddddddd', ARGV[6 + index])}
  local scope = load(key)
  if not scope then
    scope = open_scope(key, pack(HEAD, LAYOUT, second, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, hour, day, month, 0, 0, 0,
      second - RING, steady) .. string.rep('\0', RING * BUCKET_BYTES))
    scope.created, scope.changed = true, true
  end
  for kind = 0, 2 do
    local id, spent = WINDOW + kind, WINDOW_SPENT + kind
    local newer = known[1 + kind] > scope[id]
    if newer or (known[1 + kind] == scope[id] and known[4 + kind] > scope[spent]) then
      scope[id], scope[spent], scope.raised = known[1 + kind], known[4 + kind], true
    end
    -- Only where the minute begins anew: elsewhere the ring knows what has left it since.
    local missing = known[7 + kind] - scope[SPENT + kind]
    if missing > 0 and (not is_open or scope.created) then
      local values = bucket(scope, scope[SECOND])
      values[1 + kind], scope[SPENT + kind] = values[1 + kind] + missing, scope[SPENT + kind] + missing
      values.changed, scope[LAST], scope.raised = true, scope[SECOND], true
    end
  end
end

-- Holds what is missing up to the ask, whether or not it fits; what ended stays ended.
local given = {}
local function give(key, argument)
  local word = {unpack_at('<' .. string.rep('d', (#argument - 32) / 8), argument, 33)}
  local record = read_record(key)
  if record and record[1] ~= LIVES then return end
  local entries, grown = {}, not record
  record = record or {LIVES, whole(word[2], 1), 0}
  for index = 4, #record do entries[record[index][1]] = record[index] end
  for index = 6, #word - 1 do -- the last one is where unpacking ended
    local scope = loaded[KEYS[4 + whole(word[index], told)]]
    local entry, starts = entries[scope.key], 0
    if not entry then
      entry = {scope.key, {}, scope[BORN]}
      record[#record + 1], starts = entry, 1
    elseif entry[3] ~= scope[BORN] then
      -- These windows were lost and seeded anew, and never held it.
      entry[2], entry[3], starts = {}, scope[BORN], 1
    end
    local want, has = {}, {asked(entry[2])}
    for kind = 1, 3 do want[kind] = max(0, whole(word[2 + kind], MAX_AMOUNT) - has[kind]) end
    if want[1] > 0 or want[2] > 0 or want[3] > 0 or starts > 0 then
      take(scope, entry[2], want[1], want[2], want[3], starts)
      scope.raised, grown = true, true
    end
  end
  if grown then given[#given + 1] = {key, record, string.sub(argument, 1, 32), steady + whole(word[1], MAX_SUM)} end
end
for index = 1, #KEYS - 4 - told do give(KEYS[4 + told + index], ARGV[6 + told + index]) end

local function write_all()
  for index = 1, #order do
    -- Who only repeats what is known here changes nothing, and so is heard although memory is full.
    if order[index].created or order[index].raised then write_scope(order[index]) end
  end
  for index = 1, #given do
    local key, record, id, lease_until = unpack(given[index], 1, 4)
    call('SET', key, cmsgpack.pack(record))
    -- One that is there keeps its lease: `extend` renews it.
    if not call('ZSCORE', KEYS[2], id) then call('ZADD', KEYS[2], format('%.0f', lease_until), id) end
  end
end

if is_open then
  write_all()
  if clock_moved then write_epoch() end
  return 'D' .. pack('<ll', 0, 0)
end

local first = since and 0 or 1
since = whole(since or format('%.0f', wall), MAX_SUM)
local wait = min(collect, since + collect - wall)
if wait > 0 then
  write_all()
  -- Forgotten by itself, so that processes that die while it collects do not leave a store that opens too early.
  call('SET', KEYS[4], format('%.0f', since), 'PX', format('%.0f', collect * 10))
  return 'D' .. pack('<ll', wait, first)
end
epoch, clock_last, clock_shift = wall, wall, 0
write_all()
local done = write_epoch()
if done.err then return done end
call('DEL', KEYS[4])
return 'D' .. pack('<ll', 0, first)
