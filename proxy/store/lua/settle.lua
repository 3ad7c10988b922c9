-- settle: ends a reservation, once, and books what it came to.
-- KEYS[4] the reservation, KEYS[5...] scopes
-- ARGV[5] id, [6] prefix of the keys of roll-ups, [7] milliseconds that they are kept, [8] fields that one may have,
-- ARGV[9] the actual amounts as three doubles, ARGV[10...] the same for each scope, then for each entry: the tenant as
-- part of a key, the field, the field for the overflow, counts as doubles, the number of words of its record, the words
-- Answers S settled, A already, L late, U unknown (each with epoch, rows), C cold (numbers of the unknown scopes).
if not is_open then return 'C' end
reap()
local record = read_record(KEYS[4])
local scopes, missing = load_all(5, #KEYS)
if not scopes then
  flush()
  return 'C' .. missing
end
if record and record[1] == SETTLED then
  flush()
  return 'A' .. pack('<l', epoch) .. rows(scopes)
end

local function amounts(packed)
  local used = {unpack_at('<ddd', packed)}
  for kind = 1, 3 do used[kind] = whole(used[kind], MAX_AMOUNT) end
  return used
end

local actual, own = amounts(ARGV[9]), {}
for index = 1, #scopes do own[KEYS[4 + index]] = amounts(ARGV[9 + index]) end

-- Roll-ups are read here, before anything is written, and written below.
local rollups, rollup_order, records = {}, {}, {}
local function read_entry(at)
  local tenant, field, counts, words = ARGV[at], ARGV[at + 1], ARGV[at + 3], whole(ARGV[at + 4], 200)
  local index_key = ARGV[6] .. format('%.0f', hour)
  local key = index_key .. ':' .. tenant
  local known = call('HGET', key, field)
  local fresh
  if not known then
    local fields = call('HLEN', key)
    fresh = fields == 0 and call('SCARD', index_key) >= 0
    if fields >= whole(ARGV[8], MAX_SUM) then
      field = ARGV[at + 2]
      known = call('HGET', key, field)
    end
  end
  local place = #key .. ':' .. key .. field
  local rollup = rollups[place]
  if not rollup then
    rollup = {key = key, field = field, index_key = index_key, tenant = tenant, fresh = fresh}
    rollup.sums = known and {unpack_at('<dddddddd', known)} or {0, 0, 0, 0, 0, 0, 0, 0}
    rollups[place] = rollup
    rollup_order[#rollup_order + 1] = rollup
  end
  local added = {unpack_at('<dddddddd', counts)}
  for index = 1, 8 do rollup.sums[index] = min(rollup.sums[index] + added[index], MAX_SUM) end
  if words > 0 then records[#records + 1] = {at + 5, at + 4 + words} end
  return at + 5 + words
end

local at = 10 + #scopes
while at <= #ARGV do at = read_entry(at) end
if #records > 0 then call('XLEN', KEYS[3]) end

local answer
local finish, correct, spend = ends()
if not record then
  answer = 'U'
  for index = 1, #scopes do spend(scopes[index], own[KEYS[4 + index]]) end
else
  answer = record[1] == EXPIRED and 'L' or 'S'
  for index = 4, #record do
    local entry = record[index]
    -- Windows that are gone have nothing to give back; those of this call's scopes are there.
    local scope = load(entry[1])
    local used = own[entry[1]] or actual
    if scope and answer == 'S' then finish(scope, entry, used) end
    if scope and answer == 'L' then correct(scope, entry, used) end
  end
end

call('ZREM', KEYS[2], ARGV[5])
keep_ended(KEYS[4], {SETTLED, 0, 0})
flush()
for index = 1, #rollup_order do
  local rollup = rollup_order[index]
  call('HSET', rollup.key, rollup.field, pack('<dddddddd', unpack(rollup.sums, 1, 8)))
  if rollup.fresh then
    call('PEXPIRE', rollup.key, ARGV[7])
    call('SADD', rollup.index_key, rollup.tenant)
    call('PEXPIRE', rollup.index_key, ARGV[7])
  end
end
for index = 1, #records do
  call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[4], '*', unpack(ARGV, records[index][1], records[index][2]))
end
return answer .. pack('<l', epoch) .. rows(scopes)
