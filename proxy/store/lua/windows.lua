-- What every verb shares: the time, and the windows of scopes. The arithmetic is that of proxy/budget/windows.py.
--
-- Nothing is written while a verb still reads: state is loaded into tables, changed there, and `flush` writes it all
-- at the end. So whatever is wrong with an argument or a key is found before the first write, and an error leaves
-- nothing half done. (Redis does not roll a script back.)
--
-- The keys and arguments of every verb begin alike:
--   KEYS[1] epoch, KEYS[2] leases, KEYS[3] outbox
--   ARGV[1] wall milliseconds or 0, ARGV[2] prefix of the keys of reservations, ARGV[3] milliseconds that an ended
--   reservation is remembered, ARGV[4] records that the outbox keeps
-- The keys of a lost reservation's own scopes stand in its record; all keys share one hash tag, hence one slot.
--
-- A scope is one string: a head of 20 doubles, then a ring of 61 buckets of 6 doubles, little-endian. Doubles hold
-- every integer below 2^53; one read and one unpack cost a tenth of reading twenty fields of a hash.
--
-- Every call runs the text from its beginning, and makes each function anew. Hence functions for rare cases are made
-- inside of others, when the case is there, and numbers that go to Redis as they are stand here as text.
local call, floor, min, max = redis.call, math.floor, math.min, math.max
local pack, unpack_at, format = struct.pack, struct.unpack, string.format
local RING, MAX_SUM, MAX_AMOUNT, LAYOUT = 61, 9007199254740991, 8796093022208, 1
local HOUR, DAY = 3600000, 86400000
local HEAD, HEAD_BYTES = '<dddddddddddddddddddd', 160
local BUCKET, BUCKET_BYTES = '<dddddd', 48
local SCOPE_BYTES = 3088
-- The head: layout, second, spent and held of the ring, held at all, live, calendar windows and what was spent in
-- them, the second of the last count, and when these windows began.
local SECOND, SPENT, HELD, OPEN, LIVE, WINDOW, WINDOW_SPENT, LAST, BORN = 2, 3, 6, 9, 12, 13, 16, 19, 20

local function whole(text, largest)
  local number = tonumber(text)
  if not number or number < 0 or number > largest or number ~= floor(number) then error('bw: not an amount') end
  return number
end

-- The moment of this call. The epoch holds: layout, number of this life, newest reading and shift of the steady clock,
-- and the month of the day of that reading. Without it the store is cold.
local wall = whole(ARGV[1], MAX_SUM)
if wall == 0 then
  local time = call('TIME')
  wall = time[1] * 1000 + floor(time[2] / 1000)
end
local day = floor(wall / DAY)
local epoch, clock_last, clock_shift, clock_day, month
local clock_moved = false
local is_open = call('GET', KEYS[1])
if is_open then
  local layout
  layout, epoch, clock_last, clock_shift, clock_day, month = unpack_at('<dddddd', is_open)
  if layout ~= LAYOUT then error('bw: another layout') end
  if wall < clock_last - 1000 then
    clock_shift, clock_last, clock_moved = clock_shift + clock_last - wall, wall, true
  elseif wall >= clock_last + 1000 then
    clock_last, clock_moved = wall, true
  end
end
if day ~= clock_day then
  -- Months since year 0 of a day since 1970.
  local shifted = day + 719468
  local era = floor(shifted / 146097)
  local of_era = shifted - era * 146097
  local year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
  local of_year = of_era - (365 * year + floor(year / 4) - floor(year / 100))
  month = (era * 400 + year) * 12 + floor((5 * of_year + 2) / 153) + 2
  clock_day, clock_moved = day, true
end
local hour = floor(wall / HOUR)
local steady = wall + (clock_shift or 0)
local second = floor(steady / 1000)

local function write_epoch()
  return redis.pcall('SET', KEYS[1], pack('<dddddd', LAYOUT, epoch, clock_last, clock_shift, clock_day, month))
end

-- Scopes of this call by key, and in the order in which they were loaded.
local loaded, order = {}, {}

local function bucket(scope, at)
  local index = at % RING
  local found = scope.buckets[index]
  if not found then
    found = {unpack_at(BUCKET, scope.raw, HEAD_BYTES + index * BUCKET_BYTES + 1)}
    scope.buckets[index] = found
  end
  return found
end

-- Lets go of what left the ring.
local function advance(scope)
  local old = scope[SECOND]
  scope[SECOND], scope.changed = second, true
  local empty = true
  for index = SPENT, SPENT + 5 do empty = empty and scope[index] == 0 end
  if empty then return end
  local from = max(old, second - RING) + 1
  for leaving = from, second do
    local gone = bucket(scope, leaving)
    for index = 1, 6 do
      scope[SPENT - 1 + index] = scope[SPENT - 1 + index] - gone[index]
      gone[index] = 0
    end
  end
  scope.cleared_from, scope.cleared = from, second - from + 1
end

-- The scope that `raw` holds, brought up to now. A roll is written even by a call that is refused: at most once a
-- second, and whoever is refused next need not roll the same buckets again.
local function open_scope(key, raw)
  local scope = {unpack_at(HEAD, raw)}
  scope.key, scope.raw, scope.buckets, scope.written_day = key, raw, {}, scope[WINDOW + 1]
  if second > scope[SECOND] then advance(scope) end
  if hour > scope[WINDOW] then scope[WINDOW], scope[WINDOW_SPENT], scope.changed = hour, 0, true end
  if day > scope[WINDOW + 1] then scope[WINDOW + 1], scope[WINDOW_SPENT + 1], scope.changed = day, 0, true end
  if month > scope[WINDOW + 2] then scope[WINDOW + 2], scope[WINDOW_SPENT + 2], scope.changed = month, 0, true end
  loaded[key] = scope
  order[#order + 1] = scope
  return scope
end

-- The scope under a key of this call, or nil. A key that holds something else is an error.
local function load(key)
  local scope = loaded[key]
  if scope then return scope end
  local raw = call('GET', key)
  if not raw then return nil end
  if #raw ~= SCOPE_BYTES or unpack_at('<d', raw) ~= LAYOUT then error('bw: another layout') end
  return open_scope(key, raw)
end

-- Loads the scopes KEYS[first] to KEYS[last]. Returns them, or nil and the packed places of those that are missing.
local function load_all(first, last)
  local scopes, missing = {}, ''
  for index = first, last do
    local scope = load(KEYS[index])
    if scope then scopes[#scopes + 1] = scope else missing = missing .. pack('<l', index - first) end
  end
  if missing ~= '' then return nil, missing end
  return scopes
end

local function rows(scopes)
  local packed = {}
  for index = 1, #scopes do
    local scope, reset = scopes[index], 0
    if scope[LAST] + RING > scope[SECOND] then reset = (scope[LAST] + RING) * 1000 - steady end
    packed[index] = pack('<lllllllllllllllll', scope[3], scope[4], scope[5], scope[6], scope[7], scope[8], scope[9],
      scope[10], scope[11], scope[12], scope[13], scope[14], scope[15], scope[16], scope[17], scope[18], reset)
  end
  return table.concat(packed)
end

local offsets = {}

local function write_scope(scope)
  local key = scope.key
  if scope.created then call('SET', key, scope.raw) end
  if scope.cleared then
    local start = scope.cleared_from % RING
    local head = min(scope.cleared, RING - start)
    call('SETRANGE', key, HEAD_BYTES + start * BUCKET_BYTES, string.rep('\0', head * BUCKET_BYTES))
    if scope.cleared > head then
      call('SETRANGE', key, HEAD_BYTES, string.rep('\0', (scope.cleared - head) * BUCKET_BYTES))
    end
  end
  for index, values in pairs(scope.buckets) do
    if values.changed then
      local offset = offsets[index]
      if not offset then
        offset = format('%d', HEAD_BYTES + index * BUCKET_BYTES)
        offsets[index] = offset
      end
      call('SETRANGE', key, offset, pack(BUCKET, unpack(values, 1, 6)))
    end
  end
  call('SETRANGE', key, '0', pack(HEAD, unpack(scope, 1, 20)))
  -- Windows outlive their month by far; those of a tenant that is no more leave in the end.
  if scope.created or scope[WINDOW + 1] ~= scope.written_day then call('PEXPIRE', key, '6048000000') end
end
