-- Whether an ask fits, and why not: `fits`, `shortfall` and `take` of proxy/budget/windows.py, for all scopes at once.
-- Limits come as eight doubles a scope: seven in the order of the windows, 2^62 for none, then 1 if they are enforced.

-- Why it does not fit: scope, window, limit, used, reserved, wait (-1: never), reset. First the worst of what is
-- enforced, then the worst of what is only watched; nil where all fits.
local function explain(scopes, limits, wants)
  local function month_start(month_number)
    local year = floor((month_number - 2) / 12)
    local of_year = (month_number - 2) - year * 12
    local era = floor(year / 400)
    local rest = year - era * 400
    local of_era = rest * 365 + floor(rest / 4) - floor(rest / 100) + floor((153 * of_year + 2) / 5)
    return (era * 146097 + of_era - 719468) * DAY
  end

  -- Milliseconds until buckets with at least `need` have left the ring; what is held counts as asked.
  local function leaves(scope, kind, need)
    local at = scope[SECOND] - RING
    while need > 0 do
      at = at + 1
      local values = bucket(scope, at)
      need = need - values[kind] - values[kind + 3]
    end
    return (at + RING) * 1000 - steady
  end

  local worst
  -- Keeps what takes longest; never outlasts all, and ties go to the first.
  local function note(...)
    local found = {...}
    if not worst or (worst[6] >= 0 and (found[6] < 0 or found[6] > worst[6])) then worst = found end
  end

  local function look(index, scope, limit, want)
    local reset = 0
    if scope[LAST] + RING > scope[SECOND] then reset = (scope[LAST] + RING) * 1000 - steady end
    for kind = 1, 3 do
      local spent, held = scope[SPENT - 1 + kind], scope[HELD - 1 + kind]
      if spent + held + want[kind] > limit[kind] then
        local wait = -1
        if want[kind] <= limit[kind] then wait = leaves(scope, kind, spent + held + want[kind] - limit[kind]) end
        note(index, kind - 1, limit[kind], spent, held, wait, reset)
      end
    end
    local usd, held = want[3], scope[OPEN + 2]
    local ends_at = {
      {(scope[WINDOW] + 1) * HOUR, (scope[WINDOW] + 2) * HOUR},
      {(scope[WINDOW + 1] + 1) * DAY, (scope[WINDOW + 1] + 2) * DAY},
      {month_start(scope[WINDOW + 2] + 1), month_start(scope[WINDOW + 2] + 2)},
    }
    for window = 1, 3 do
      local most, spent = limit[3 + window], scope[WINDOW_SPENT - 1 + window]
      if spent + held + usd > most then
        local wait = -1
        -- What is held may yet settle in the next window, and fill that one too.
        if usd <= most then wait = ends_at[window][held + usd <= most and 1 or 2] - wall end
        note(index, 2 + window, most, spent, held, wait, ends_at[window][1] - wall)
      end
    end
    -- Nobody knows when a running request ends: a hint of a second.
    if scope[LIVE] + want[4] > limit[7] then note(index, 6, limit[7], scope[LIVE], 0, 1000, 1000) end
  end

  local found = {}
  for enforced = 1, 0, -1 do
    worst = nil
    for index = 1, #scopes do
      if limits[index][8] == enforced then look(index - 1, scopes[index], limits[index], wants[index]) end
    end
    found[enforced] = worst and pack('<lllllll', unpack(worst, 1, 7))
  end
  return found[1], found[0]
end

-- Nothing if all fits, else the answers of `explain`.
local function judge(scopes, limits, wants)
  for index = 1, #scopes do
    local scope, limit, want = scopes[index], limits[index], wants[index]
    local usd = want[3]
    local open_usd = scope[11] + usd
    if scope[3] + scope[6] + want[1] > limit[1] or scope[4] + scope[7] + want[2] > limit[2]
      or scope[5] + scope[8] + usd > limit[3] or scope[16] + open_usd > limit[4]
      or scope[17] + open_usd > limit[5] or scope[18] + open_usd > limit[6] or scope[12] + want[4] > limit[7] then
      return explain(scopes, limits, wants)
    end
  end
end

-- Holds an ask in the current bucket, and appends it to the parts of a reservation.
local function take(scope, parts, requests, tokens, usd, starts)
  local at = scope[SECOND]
  local values = bucket(scope, at)
  values[4], values[5], values[6] = values[4] + requests, values[5] + tokens, values[6] + usd
  scope[6], scope[7], scope[8] = scope[6] + requests, scope[7] + tokens, scope[8] + usd
  scope[9], scope[10], scope[11] = scope[9] + requests, scope[10] + tokens, scope[11] + usd
  scope[LIVE], scope[LAST] = scope[LIVE] + starts, at
  values.changed, scope.changed = true, true
  local count = #parts
  parts[count + 1], parts[count + 2], parts[count + 3], parts[count + 4] = at, requests, tokens, usd
end

local function granted(scopes, over)
  if over then return 'O' .. pack('<l', epoch) .. over .. rows(scopes) end
  return 'G' .. pack('<l', epoch) .. rows(scopes)
end
