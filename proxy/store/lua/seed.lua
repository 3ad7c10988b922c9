-- seed: takes over what a process remembers, and opens a store that has collected for long enough.
-- KEYS[4] since when it collects, KEYS[5...] scopes
-- ARGV[5] milliseconds to collect, ARGV[6...] for each scope: hour, day, month, and what was spent in them, as doubles
-- Answers D (milliseconds still to collect, 1 if this call was the first to reach an empty store).
local collect = whole(ARGV[5], MAX_SUM)
local since = not is_open and call('GET', KEYS[4])
for index = 5, #KEYS do
  local known = {unpack_at('<dddddd', ARGV[index + 1])}
  local scope = load(KEYS[index])
  if not scope then
    scope = open_scope(KEYS[index], pack(HEAD, LAYOUT, second, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, hour, day, month, 0, 0, 0,
      second - RING, steady) .. string.rep('\0', RING * BUCKET_BYTES))
    scope.created, scope.changed = true, true
  end
  for kind = 0, 2 do
    local id, spent = WINDOW + kind, WINDOW_SPENT + kind
    local newer = known[1 + kind] > scope[id]
    if newer or (known[1 + kind] == scope[id] and known[4 + kind] > scope[spent]) then
      scope[id], scope[spent], scope.raised = known[1 + kind], known[4 + kind], true
    end
  end
end
local function write_all()
  for index = 1, #order do
    -- Who only repeats what is known here changes nothing, and so is heard although memory is full.
    if order[index].created or order[index].raised then write_scope(order[index]) end
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
