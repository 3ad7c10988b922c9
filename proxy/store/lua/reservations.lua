-- Reservations, their ends, and those that were lost.
--
-- A reservation is a packed list: state, policy (1: charge it when it is lost), steady time at which to forget it, then
-- for each scope its key, the parts (second, requests, tokens, nano-USD, and so on), when those windows began and, once
-- it has expired, what it was charged and in which calendar windows.
local LIVES, EXPIRED, SETTLED = 0, 1, 2

-- What this call ended, and what it found lost.
local ended, ended_by_key, lost

local function read_record(key)
  if ended_by_key and ended_by_key[key] then return ended_by_key[key] end
  local raw = call('GET', key)
  if not raw then return nil end
  local record = cmsgpack.unpack(raw)
  if record[1] ~= LIVES and record[3] <= steady then return nil end
  return record
end

-- Marks a record to be kept as ended for ARGV[3] milliseconds, so that a late or repeated settle is known as such.
local function keep_ended(key, record)
  record[3] = steady + whole(ARGV[3], MAX_SUM)
  if not ended then ended, ended_by_key = {}, {} end
  ended[#ended + 1] = {key, record}
  ended_by_key[key] = record
end

-- Ends of a reservation in one scope: the methods of ScopeWindows. Returns `finish`, `correct` and `spend`.
local function ends()
  local function change(scope, at, requests, tokens, usd)
    local values = bucket(scope, at)
    values[1], values[2], values[3] = values[1] + requests, values[2] + tokens, values[3] + usd
    scope[3], scope[4], scope[5] = scope[3] + requests, scope[4] + tokens, scope[5] + usd
    values.changed, scope.changed = true, true
  end

  local function spend_calendar(scope, usd)
    for index = WINDOW_SPENT, WINDOW_SPENT + 2 do scope[index] = min(scope[index] + usd, MAX_SUM) end
    scope.changed = true
  end

  -- Counts in the ring, from now on, what no reservation covers.
  local function spend_now(scope, requests, tokens, usd)
    if requests > 0 or tokens > 0 or usd > 0 then
      scope[LAST] = scope[SECOND]
      change(scope, scope[SECOND], requests, tokens, usd)
    end
  end

  local function spend(scope, used)
    spend_now(scope, used[1], used[2], used[3])
    if used[3] > 0 then spend_calendar(scope, used[3]) end
  end

  local function release(scope, parts, requests, tokens, usd)
    local oldest, spent = scope[SECOND] - RING, usd
    for index = 1, #parts, 4 do
      local at, asked_requests, asked_tokens, asked_usd = unpack(parts, index, index + 3)
      local used_requests, used_tokens = min(asked_requests, requests), min(asked_tokens, tokens)
      local used_usd = min(asked_usd, usd)
      requests, tokens, usd = requests - used_requests, tokens - used_tokens, usd - used_usd
      scope[9], scope[10], scope[11] = scope[9] - asked_requests, scope[10] - asked_tokens, scope[11] - asked_usd
      if at > oldest then
        local values = bucket(scope, at)
        values[1], values[2], values[3] = values[1] + used_requests, values[2] + used_tokens, values[3] + used_usd
        values[4], values[5], values[6] = values[4] - asked_requests, values[5] - asked_tokens, values[6] - asked_usd
        values.changed = true
        scope[3], scope[4], scope[5] = scope[3] + used_requests, scope[4] + used_tokens, scope[5] + used_usd
        scope[6], scope[7], scope[8] = scope[6] - asked_requests, scope[7] - asked_tokens, scope[8] - asked_usd
      end
    end
    scope[LIVE] = scope[LIVE] - 1
    scope.changed = true
    spend_now(scope, requests, tokens, usd)
    if spent > 0 then spend_calendar(scope, spent) end
  end

  -- Ends an entry of a live reservation. Windows that were lost and seeded anew never held it: there, what was used is
  -- spent, and nothing is given back.
  local function finish(scope, entry, used)
    if entry[3] == scope[BORN] then
      release(scope, entry[2], used[1], used[2], used[3])
    else
      spend(scope, used)
    end
  end

  -- Replaces what an expired entry was charged by what was used.
  local function correct(scope, entry, used)
    local parts, charged, windows = entry[2], entry[4], entry[5]
    if entry[3] ~= scope[BORN] then return end
    local oldest = scope[SECOND] - RING
    local was, now = {charged[1], charged[2], charged[3]}, {used[1], used[2], used[3]}
    for index = 1, #parts, 4 do
      local changes = {}
      for kind = 1, 3 do
        local had, has = min(parts[index + kind], was[kind]), min(parts[index + kind], now[kind])
        was[kind], now[kind] = was[kind] - had, now[kind] - has
        changes[kind] = has - had
      end
      if parts[index] > oldest then change(scope, parts[index], changes[1], changes[2], changes[3]) end
    end
    spend_now(scope, now[1], now[2], now[3])
    local difference = used[3] - charged[3]
    if difference > 0 then
      spend_calendar(scope, difference)
      return
    end
    for index = 0, 2 do
      if windows[index + 1] == scope[WINDOW + index] then
        scope[WINDOW_SPENT + index] = scope[WINDOW_SPENT + index] + difference
        scope.changed = true
      end
    end
  end

  return finish, correct, spend
end

local function asked(parts)
  local requests, tokens, usd = 0, 0, 0
  for index = 1, #parts, 4 do
    requests, tokens, usd = requests + parts[index + 1], tokens + parts[index + 2], usd + parts[index + 3]
  end
  return requests, tokens, usd
end

-- Books reservations whose lease is over. They are not this caller's: whatever is wrong with one of them must not stop
-- the call. A key that cannot be read here at this moment (its cluster slot is on its way) leaves it for later.
local function book_lost(over)
  local finish = ends()

  local function away(answer)
    return type(answer) == 'table' and not string.find(answer.err, 'WRONGTYPE', 1, true)
  end

  -- The scopes of a reservation beside its entries, false where there is none; nil if one is out of reach.
  local function reach(record)
    local scopes = {}
    for index = 4, #record do
      local key = record[index][1]
      local scope = loaded[key]
      if not scope then
        local raw = redis.pcall('GET', key)
        if away(raw) then return nil end
        local sound = type(raw) == 'string' and #raw == SCOPE_BYTES and unpack_at('<d', raw) == LAYOUT
        scope = sound and open_scope(key, raw)
      end
      scopes[index] = scope
    end
    return scopes
  end

  local function book(id)
    local key = ARGV[2] .. id
    local raw = redis.pcall('GET', key)
    if away(raw) then return {id = id, later = true} end
    local readable, record = pcall(cmsgpack.unpack, raw)
    if not readable or type(record) ~= 'table' or record[1] ~= LIVES then return {id = id} end
    local scopes = reach(record)
    if not scopes then return {id = id, later = true} end
    local most = {0, 0, 0}
    record[1] = EXPIRED
    for index = 4, #record do
      local entry, scope = record[index], scopes[index]
      local charged = {0, 0, 0}
      if record[2] == 1 then charged = {asked(entry[2])} end
      entry[4], entry[5] = charged, {0, 0, 0}
      if scope then
        finish(scope, entry, charged)
        entry[5] = {scope[WINDOW], scope[WINDOW + 1], scope[WINDOW + 2]}
      end
      for kind = 1, 3 do most[kind] = max(most[kind], charged[kind]) end
    end
    keep_ended(key, record)
    return {id = id, most = most}
  end

  lost = {}
  for index = 1, #over do lost[index] = book(over[index]) end
end

-- At most 20 a call: no request pays for the crash of a thousand others. KEYS[2] has them by the end of their leases.
local function reap()
  local over = call('ZRANGEBYSCORE', KEYS[2], '-inf', format('%.0f', steady), 'LIMIT', '0', '20')
  if #over > 0 then book_lost(over) end
end

-- Writes everything that changed. Where something was lost, the first write removes it from a sorted set: with that, a
-- script may go on although memory is full.
local function flush()
  if lost then
    for index = 1, #lost do call('ZREM', KEYS[2], lost[index].id) end
    for index = 1, #lost do
      local each = lost[index]
      if each.later then call('ZADD', KEYS[2], format('%.0f', steady + 60000), each.id) end
      if each.most then
        redis.pcall('XADD', KEYS[3], 'MAXLEN', '~', ARGV[4], '*', 'lost', each.id,
          'requests', format('%.0f', each.most[1]), 'tokens', format('%.0f', each.most[2]),
          'nano_usd', format('%.0f', each.most[3]))
      end
    end
  end
  if ended then
    for index = 1, #ended do call('SET', ended[index][1], cmsgpack.pack(ended[index][2]), 'PX', ARGV[3]) end
  end
  for index = 1, #order do
    if order[index].changed then write_scope(order[index]) end
  end
  if clock_moved then write_epoch() end
end
