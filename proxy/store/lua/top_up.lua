-- top_up: raises a live reservation to an ask in all scopes given, and settles the scopes that it leaves.
-- KEYS[4] the reservation, KEYS[5...] scopes to cover, then scopes to leave
-- ARGV[5] number of scopes to cover, [6] requests, [7] tokens, [8] nano-USD, ARGV[9...] limits of the scopes to cover,
-- then what was used in each scope to leave, as three doubles
-- Answers as reserve.
if not is_open then return 'C' end
local covered = whole(ARGV[5], #KEYS)
local ask = {whole(ARGV[6], MAX_AMOUNT), whole(ARGV[7], MAX_AMOUNT), whole(ARGV[8], MAX_AMOUNT)}
reap()
local record = read_record(KEYS[4])
if not record or record[1] ~= LIVES then
  flush()
  return 'E'
end
local entries = {}
for index = 4, #record do entries[record[index][1]] = record[index] end

local scopes, missing = load_all(5, 4 + covered)
if not scopes then
  flush()
  return 'C' .. missing
end
local limits, wants = {}, {}
for index = 1, covered do
  limits[index] = {unpack_at('<dddddddd', ARGV[8 + index])}
  local entry = entries[KEYS[4 + index]]
  if entry and entry[3] ~= scopes[index][BORN] then
    -- These windows were lost and seeded anew, and never held it: it joins them like any other.
    entry[2], entry[3] = {}, scopes[index][BORN]
    wants[index] = {ask[1], ask[2], ask[3], 1}
  elseif entry then
    local requests, tokens, usd = asked(entry[2])
    wants[index] = {max(0, ask[1] - requests), max(0, ask[2] - tokens), max(0, ask[3] - usd), 0}
  else
    wants[index] = {ask[1], ask[2], ask[3], 1}
  end
end
local refused, over = judge(scopes, limits, wants)
if refused then
  flush()
  return 'R' .. pack('<l', epoch) .. refused
end

local left = {}
local finish = ends()
for index = covered + 1, #KEYS - 4 do
  local key = KEYS[4 + index]
  if entries[key] then
    left[key] = true
    local used = {unpack_at('<ddd', ARGV[8 + index])}
    local scope = load(key)
    if scope then finish(scope, entries[key], used) end
  end
end
local kept = {record[1], record[2], record[3]}
for index = 4, #record do
  if not left[record[index][1]] then kept[#kept + 1] = record[index] end
end
for index = 1, covered do
  local want = wants[index]
  local entry = entries[KEYS[4 + index]]
  if not entry then
    entry = {KEYS[4 + index], {}, scopes[index][BORN]}
    kept[#kept + 1] = entry
  end
  if want[1] > 0 or want[2] > 0 or want[3] > 0 or want[4] > 0 then
    take(scopes[index], entry[2], want[1], want[2], want[3], want[4])
  end
end
flush()
call('SET', KEYS[4], cmsgpack.pack(kept))
return granted(scopes, over)
