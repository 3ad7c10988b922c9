-- Whether an ask fits: `fits` and `shortfall` of proxy/budget/windows.py, and the taking of it in all scopes at once.
-- Limits come as eight doubles a scope: seven in the order of the windows, -1 for none, then 1 if they are enforced.
local CONCURRENCY_HINT = 1000

local function read_limits(packed)
  local limits = {unpack_at('<dddddddd', packed)}
  for index = 1, 7 do
    if limits[index] < 0 then limits[index] = math.huge end
  end
  return limits
end

local function fits(scope, limits, want)
  local open_usd = scope[OPEN + 2] + want[3]
  return scope[3] + scope[6] + want[1] <= limits[1]
    and scope[4] + scope[7] + want[2] <= limits[2]
    and scope[5] + scope[8] + want[3] <= limits[3]
    and scope[HOUR_SPENT] + open_usd <= limits[4]
    and scope[HOUR_SPENT + 1] + open_usd <= limits[5]
    and scope[HOUR_SPENT + 2] + open_usd <= limits[6]
    and scope[LIVE] + want[4] <= limits[7]
end

-- Milliseconds until buckets with at least `need` have left the ring; what is held counts as asked.
local function leaves(scope, kind, need)
  scope.raw = scope.raw or call('GETRANGE', scope.key, HEAD_BYTES, -1)
  local at = scope[SECOND] - RING
  while need > 0 do
    at = at + 1
    local values = bucket(scope, at)
    need = need - values[kind] - values[kind + 3]
  end
  return (at + RING) * 1000 - steady
end

-- Keeps the window that takes longest; -1 is never, and outlasts all. Ties go to the first.
local function note(worst, index, window, limit, used, reserved, wait, reset)
  if not worst or (worst[6] >= 0 and (wait < 0 or wait > worst[6])) then
    return {index, window, limit, used, reserved, wait, reset}
  end
  return worst
end

local function shortfall(worst, index, scope, limits, want)
  for kind = 1, 3 do
    local limit, spent, held = limits[kind], scope[SPENT - 1 + kind], scope[HELD - 1 + kind]
    if spent + held + want[kind] > limit then
      local wait = -1
      if want[kind] <= limit then wait = leaves(scope, kind, spent + held + want[kind] - limit) end
      worst = note(worst, index, kind - 1, limit, spent, held, wait, minute_reset(scope))
    end
  end
  local usd, held = want[3], scope[OPEN + 2]
  local ends = {
    {(scope[HOUR_ID] + 1) * HOUR, (scope[HOUR_ID] + 2) * HOUR},
    {(scope[HOUR_ID + 1] + 1) * DAY, (scope[HOUR_ID + 1] + 2) * DAY},
    {month_start(scope[HOUR_ID + 2] + 1), month_start(scope[HOUR_ID + 2] + 2)},
  }
  for window = 1, 3 do
    local limit, spent = limits[3 + window], scope[HOUR_SPENT - 1 + window]
    if spent + held + usd > limit then
      local wait = -1
      -- What is held may yet settle in the next window, and fill that one too.
      if usd <= limit then wait = ends[window][held + usd <= limit and 1 or 2] - wall end
      worst = note(worst, index, 2 + window, limit, spent, held, wait, ends[window][1] - wall)
    end
  end
  if scope[LIVE] + want[4] > limits[7] then
    worst = note(worst, index, 6, limits[7], scope[LIVE], 0, CONCURRENCY_HINT, CONCURRENCY_HINT)
  end
  return worst
end

local function pack_refusal(refusal)
  return pack('<lllllll', unpack(refusal, 1, 7))
end

-- The worst of what is enforced, and the worst of what is only watched; nil where all fits.
local function judge(scopes, limits, wants)
  local refused, over
  for index = 1, #scopes do
    if not fits(scopes[index], limits[index], wants[index]) then
      if limits[index][8] == 1 then
        refused = shortfall(refused, index - 1, scopes[index], limits[index], wants[index])
      else
        over = shortfall(over, index - 1, scopes[index], limits[index], wants[index])
      end
    end
  end
  return refused, over
end

local function granted(scopes, over)
  local head = pack('<l', epoch)
  return (over and 'O' or 'G') .. head .. (over and pack_refusal(over) or '') .. rows(scopes)
end
