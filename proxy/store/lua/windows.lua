-- What every verb shares: the same arithmetic as proxy/budget/windows.py, on scopes that are kept packed.
--
-- Nothing is written while a verb still reads: state is loaded into tables, changed there, and `flush` writes it all
-- at the end. So whatever is wrong with an argument or a key is found before the first write, and an error leaves
-- nothing half done. (Redis does not roll a script back.)
--
-- A scope is one string: a head of 20 doubles, then a ring of 61 buckets of 6 doubles, little-endian. Doubles hold
-- every integer below 2^53, and one unpack costs a tenth of twenty fields of a hash.
--
-- The keys and arguments of every verb begin alike:
--   KEYS[1] epoch, KEYS[2] leases, KEYS[3] outbox
--   ARGV[1] wall milliseconds or 0, ARGV[2] prefix of the keys of reservations, ARGV[3] milliseconds that an ended
--   reservation is remembered, ARGV[4] records that the outbox keeps
-- The keys of a lost reservation's own scopes stand in its record; all keys share one hash tag, hence one slot.
local call, floor, min, max = redis.call, math.floor, math.min, math.max
local pack, unpack_at = struct.pack, struct.unpack
local RING, MAX_SUM, MAX_AMOUNT, LAYOUT = 61, 9007199254740991, 8796093022208, 1
local HOUR, DAY, STEP = 3600000, 86400000, 1000
local HEAD, HEAD_BYTES = '<dddddddddddddddddddd', 160
local BUCKET, BUCKET_BYTES = '<dddddd', 48
local SECOND, SPENT, HELD, OPEN, LIVE, HOUR_ID, HOUR_SPENT, LAST, BORN = 2, 3, 6, 9, 12, 13, 16, 19, 20
local LIVES, EXPIRED, SETTLED = 0, 1, 2

local function whole(text, largest)
  local number = tonumber(text)
  if not number or number < 0 or number > largest or number ~= floor(number) then error('bw: not an amount') end
  return number
end

-- Months since year 0 of a day since 1970, and the wall milliseconds at which a month begins.
local function month_of(day)
  local shifted = day + 719468
  local era = floor(shifted / 146097)
  local of_era = shifted - era * 146097
  local year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
  local of_year = of_era - (365 * year + floor(year / 4) - floor(year / 100))
  return (era * 400 + year) * 12 + floor((5 * of_year + 2) / 153) + 2
end

local function month_start(month)
  local year = floor((month - 2) / 12)
  local of_year = (month - 2) - year * 12
  local era = floor(year / 400)
  local rest = year - era * 400
  local day = era * 146097 + rest * 365 + floor(rest / 4) - floor(rest / 100) + floor((153 * of_year + 2) / 5) - 719468
  return day * DAY
end

-- The moment of this call. `wall_argument` is 0 for the server's own clock. KEYS[1] holds the epoch: layout, number,
-- newest reading and shift of the steady clock; without it the store is cold, and the answer is false.
local wall, steady, second, hour, day, month
local epoch, clock_last, clock_shift, clock_moved

local function read_clock(wall_argument)
  wall = whole(wall_argument, MAX_SUM)
  if wall == 0 then
    local time = call('TIME')
    wall = time[1] * 1000 + floor(time[2] / 1000)
  end
  local shift = 0
  local raw = call('GET', KEYS[1])
  if raw then
    local layout
    layout, epoch, clock_last, clock_shift = unpack_at('<dddd', raw)
    if layout ~= LAYOUT then error('bw: another layout') end
    if wall < clock_last - STEP then
      clock_shift, clock_last, clock_moved = clock_shift + clock_last - wall, wall, true
    elseif wall >= clock_last + STEP then
      clock_last, clock_moved = wall, true
    end
    shift = clock_shift
  end
  steady = wall + shift
  second, hour, day = floor(steady / 1000), floor(wall / HOUR), floor(wall / DAY)
  month = month_of(day)
  return raw
end

local function write_epoch()
  return redis.pcall('SET', KEYS[1], pack('<dddd', LAYOUT, epoch, clock_last, clock_shift))
end

-- Scopes ----------------------------------------------------------------------------------------------------------

local loaded, order = {}, {}

local function remember(key, scope)
  scope.key, scope.buckets, scope.changed = key, {}, false
  loaded[key] = scope
  order[#order + 1] = scope
  return scope
end

local function bucket(scope, at)
  local index = at % RING
  local found = scope.buckets[index]
  if not found then
    local from = HEAD_BYTES + index * BUCKET_BYTES
    if scope.raw then
      found = {unpack_at(BUCKET, scope.raw, index * BUCKET_BYTES + 1)}
    else
      found = {unpack_at(BUCKET, call('GETRANGE', scope.key, from, from + BUCKET_BYTES - 1))}
    end
    scope.buckets[index] = found
  end
  return found
end

-- A roll is written even by a call that is refused: at most once a second, and whoever is refused next need not roll
-- the same buckets again.
local function roll(scope)
  local old = scope[SECOND]
  if second > old then
    scope[SECOND], scope.changed = second, true
    local empty = true
    for index = SPENT, SPENT + 5 do empty = empty and scope[index] == 0 end
    if not empty then
      local from = max(old, second - RING) + 1
      if second - from > 1 then scope.raw = call('GETRANGE', scope.key, HEAD_BYTES, -1) end
      for leaving = from, second do
        local gone = bucket(scope, leaving)
        for index = 1, 6 do
          scope[SPENT - 1 + index] = scope[SPENT - 1 + index] - gone[index]
          gone[index] = 0
        end
      end
      scope.cleared_from, scope.cleared = from, second - from + 1
    end
  end
  if hour > scope[HOUR_ID] then scope[HOUR_ID], scope[HOUR_SPENT], scope.changed = hour, 0, true end
  if day > scope[HOUR_ID + 1] then scope[HOUR_ID + 1], scope[HOUR_SPENT + 1], scope.changed = day, 0, true end
  if month > scope[HOUR_ID + 2] then scope[HOUR_ID + 2], scope[HOUR_SPENT + 2], scope.changed = month, 0, true end
end

-- The scope under a key, brought up to now; nil where there is none. A key of another kind is an error of the caller's
-- own scope; in somebody else's reservation (`foreign`) it must not stop this call. The second answer is true where the
-- key cannot be read here at this moment: its cluster slot is on its way.
local function load(key, foreign)
  local scope = loaded[key]
  if scope then return scope end
  local raw = (foreign and redis.pcall or call)('GETRANGE', key, 0, HEAD_BYTES - 1)
  if raw == '' then return nil end
  if type(raw) == 'table' and not string.find(raw.err, 'WRONGTYPE', 1, true) then return nil, true end
  if type(raw) == 'table' or #raw < HEAD_BYTES or unpack_at('<d', raw) ~= LAYOUT then
    if foreign then return nil end
    error('bw: another layout')
  end
  scope = {unpack_at(HEAD, raw)}
  scope.written_day = scope[HOUR_ID + 1]
  remember(key, scope)
  roll(scope)
  return scope
end

-- Loads all of KEYS from `first` on. Returns the scopes, or nil and the packed numbers of those that are missing.
local function load_all(first)
  local scopes, missing = {}, {}
  for index = first, #KEYS do
    local scope = load(KEYS[index])
    if scope then scopes[#scopes + 1] = scope else missing[#missing + 1] = pack('<l', index - first) end
  end
  if #missing > 0 then return nil, table.concat(missing) end
  return scopes
end

local function write_scope(scope)
  if scope.created then call('SET', scope.key, scope.created) end
  if scope.cleared then
    local start = scope.cleared_from % RING
    local head = min(scope.cleared, RING - start)
    call('SETRANGE', scope.key, HEAD_BYTES + start * BUCKET_BYTES, string.rep('\0', head * BUCKET_BYTES))
    if scope.cleared > head then
      call('SETRANGE', scope.key, HEAD_BYTES, string.rep('\0', (scope.cleared - head) * BUCKET_BYTES))
    end
  end
  for index, values in pairs(scope.buckets) do
    if values.changed then
      call('SETRANGE', scope.key, HEAD_BYTES + index * BUCKET_BYTES, pack(BUCKET, unpack(values, 1, 6)))
    end
  end
  call('SETRANGE', scope.key, 0, pack(HEAD, unpack(scope, 1, 20)))
  -- Windows outlive their month by far; those of a tenant that is no more leave in the end.
  if scope.created or scope[HOUR_ID + 1] ~= scope.written_day then call('PEXPIRE', scope.key, 70 * DAY) end
end

local function minute_reset(scope)
  if scope[LAST] + RING <= scope[SECOND] then return 0 end
  return (scope[LAST] + RING) * 1000 - steady
end

local function row(scope)
  return pack('<lllllllllllllllll', scope[3], scope[4], scope[5], scope[6], scope[7], scope[8], scope[9], scope[10],
    scope[11], scope[12], scope[13], scope[14], scope[15], scope[16], scope[17], scope[18], minute_reset(scope))
end

local function rows(scopes)
  local packed = {}
  for index = 1, #scopes do packed[index] = row(scopes[index]) end
  return table.concat(packed)
end

-- Counting: the methods of ScopeWindows ---------------------------------------------------------------------------

local function change(scope, at, offset, requests, tokens, usd)
  local values = bucket(scope, at)
  values[offset + 1] = values[offset + 1] + requests
  values[offset + 2] = values[offset + 2] + tokens
  values[offset + 3] = values[offset + 3] + usd
  values.changed = true
  local sum = SPENT + offset
  scope[sum], scope[sum + 1], scope[sum + 2] = scope[sum] + requests, scope[sum + 1] + tokens, scope[sum + 2] + usd
  scope.changed = true
end

local function add_open(scope, requests, tokens, usd, live)
  scope[OPEN], scope[OPEN + 1], scope[OPEN + 2] = scope[OPEN] + requests, scope[OPEN + 1] + tokens, scope[OPEN + 2] + usd
  scope[LIVE] = scope[LIVE] + live
  scope.changed = true
end

local function spend_now(scope, requests, tokens, usd)
  if requests > 0 or tokens > 0 or usd > 0 then
    scope[LAST] = scope[SECOND]
    change(scope, scope[SECOND], 0, requests, tokens, usd)
  end
end

local function spend_calendar(scope, usd)
  for index = HOUR_SPENT, HOUR_SPENT + 2 do scope[index] = min(scope[index] + usd, MAX_SUM) end
  scope.changed = true
end

-- Appends a part (second, requests, tokens, nano-USD) to a reservation's flat list.
local function take(scope, parts, requests, tokens, usd, starts)
  scope[LAST] = scope[SECOND]
  change(scope, scope[SECOND], 3, requests, tokens, usd)
  add_open(scope, requests, tokens, usd, starts)
  local count = #parts
  parts[count + 1], parts[count + 2], parts[count + 3], parts[count + 4] = scope[SECOND], requests, tokens, usd
end

local function release(scope, parts, requests, tokens, usd)
  local oldest, spent = scope[SECOND] - RING, usd
  for index = 1, #parts, 4 do
    local asked_requests, asked_tokens, asked_usd = parts[index + 1], parts[index + 2], parts[index + 3]
    local used_requests, used_tokens, used_usd = min(asked_requests, requests), min(asked_tokens, tokens), min(asked_usd, usd)
    requests, tokens, usd = requests - used_requests, tokens - used_tokens, usd - used_usd
    add_open(scope, -asked_requests, -asked_tokens, -asked_usd, 0)
    if parts[index] > oldest then
      change(scope, parts[index], 0, used_requests, used_tokens, used_usd)
      change(scope, parts[index], 3, -asked_requests, -asked_tokens, -asked_usd)
    end
  end
  scope[LIVE] = scope[LIVE] - 1
  scope.changed = true
  spend_now(scope, requests, tokens, usd)
  if spent > 0 then spend_calendar(scope, spent) end
end

local function correct(scope, parts, charged, used, windows)
  local oldest = scope[SECOND] - RING
  local was, now = {charged[1], charged[2], charged[3]}, {used[1], used[2], used[3]}
  for index = 1, #parts, 4 do
    local changes = {}
    for kind = 1, 3 do
      local had, has = min(parts[index + kind], was[kind]), min(parts[index + kind], now[kind])
      was[kind], now[kind] = was[kind] - had, now[kind] - has
      changes[kind] = has - had
    end
    if parts[index] > oldest then change(scope, parts[index], 0, changes[1], changes[2], changes[3]) end
  end
  spend_now(scope, now[1], now[2], now[3])
  local difference = used[3] - charged[3]
  if difference > 0 then
    spend_calendar(scope, difference)
  else
    for index = 0, 2 do
      if windows[index + 1] == scope[HOUR_ID + index] then
        scope[HOUR_SPENT + index] = scope[HOUR_SPENT + index] + difference
        scope.changed = true
      end
    end
  end
end

-- Ends an entry of a reservation in its scope. Windows that were lost and seeded anew (BORN) never held it: there, what
-- was used is spent, and nothing is given back.
local function finish(scope, entry, used)
  if entry[3] == scope[BORN] then
    release(scope, entry[2], used[1], used[2], used[3])
  else
    spend_now(scope, used[1], used[2], used[3])
    spend_calendar(scope, used[3])
  end
end

local function asked(parts)
  local requests, tokens, usd = 0, 0, 0
  for index = 1, #parts, 4 do
    requests, tokens, usd = requests + parts[index + 1], tokens + parts[index + 2], usd + parts[index + 3]
  end
  return requests, tokens, usd
end

-- Reservations: a packed list of state, policy, time to forget it, then for each scope its key, the parts, when those
-- windows began and, once it is expired, what it was charged and in which calendar windows. -------------------------

local ended, ended_by_key = {}, {}

local function read_record(key)
  local record = ended_by_key[key]
  if record then return record end
  local raw = call('GET', key)
  if not raw then return nil end
  record = cmsgpack.unpack(raw)
  if record[1] ~= LIVES and record[3] <= steady then return nil end
  return record
end

-- Marks a record to be kept as ended for ARGV[3] milliseconds, so that a late or repeated settle is known as such.
local function keep_ended(key, record)
  record[3] = steady + whole(ARGV[3], MAX_SUM)
  ended[#ended + 1] = {key, record}
  ended_by_key[key] = record
end

-- Lost reservations: booked by whoever comes next, at most 20 a call. KEYS[2] is the sorted set of leases.
local LATER = 60000
local lost = {}

-- The scopes of a lost reservation, each beside its entry; nil if one of them cannot be read at this moment.
local function reach(record)
  local scopes = {}
  for index = 4, #record do
    local scope, elsewhere = load(record[index][1], true)
    if elsewhere then return nil end
    scopes[index] = scope or false
  end
  return scopes
end

local function expire(id)
  local key = ARGV[2] .. id
  local raw = redis.pcall('GET', key)
  local most = {id = id, 0, 0, 0}
  lost[#lost + 1] = most
  if type(raw) == 'table' and not string.find(raw.err, 'WRONGTYPE', 1, true) then
    most.later = true
    return
  end
  local readable, record = pcall(cmsgpack.unpack, raw)
  if not readable or type(record) ~= 'table' or record[1] ~= LIVES then return end
  local scopes = reach(record)
  if not scopes then
    most.later = true
    return
  end
  record[1] = EXPIRED
  for index = 4, #record do
    local entry, scope = record[index], scopes[index]
    local charged = {0, 0, 0}
    if record[2] == 1 then charged = {asked(entry[2])} end
    entry[4], entry[5] = charged, {0, 0, 0}
    if scope then
      finish(scope, entry, charged)
      entry[5] = {scope[HOUR_ID], scope[HOUR_ID + 1], scope[HOUR_ID + 2]}
    end
    for kind = 1, 3 do most[kind] = max(most[kind], charged[kind]) end
  end
  most.booked = true
  keep_ended(key, record)
end

local function reap()
  local over = call('ZRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', steady), 'LIMIT', 0, 20)
  for index = 1, #over do expire(over[index]) end
end

local function exact(number)
  return string.format('%.0f', number)
end

-- Writes everything that changed. The first write removes from a sorted set wherever something was lost or settled:
-- with it a script may go on although memory is full.
local function flush()
  for index = 1, #lost do call('ZREM', KEYS[2], lost[index].id) end
  for index = 1, #ended do
    local each = ended[index]
    call('SET', each[1], cmsgpack.pack(each[2]), 'PX', ARGV[3])
  end
  for index = 1, #order do
    if order[index].changed then write_scope(order[index]) end
  end
  for index = 1, #lost do
    local each = lost[index]
    if each.later then call('ZADD', KEYS[2], exact(steady + LATER), each.id) end
    if each.booked then
      redis.pcall('XADD', KEYS[3], 'MAXLEN', '~', ARGV[4], '*', 'lost', each.id, 'requests', exact(each[1]), 'tokens',
        exact(each[2]), 'nano_usd', exact(each[3]))
    end
  end
  if clock_moved then write_epoch() end
end
