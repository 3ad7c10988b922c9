-- reserve: holds an ask in all scopes, or says why not.
-- KEYS[4] the reservation, KEYS[5...] scopes
-- ARGV[5] id, [6] milliseconds of lease, [7] 1 to charge it when it is lost, [8] requests, [9] tokens, [10] nano-USD,
-- ARGV[11...] limits, one for each scope
-- Answers G granted (epoch, rows), O granted over a limit that is not enforced (epoch, refusal, rows), R refused
-- (epoch, scope, window, limit, used, reserved, wait, reset), E ended, C cold (numbers of the unknown scopes).
if not is_open then return 'C' end
local id, lease = ARGV[5], whole(ARGV[6], MAX_SUM)
local want = {whole(ARGV[8], MAX_AMOUNT), whole(ARGV[9], MAX_AMOUNT), whole(ARGV[10], MAX_AMOUNT), 1}
reap()
local record = read_record(KEYS[4])
if record then
  if record[1] ~= LIVES then
    flush()
    return 'E'
  end
  local scopes, missing = load_all(5, #KEYS)
  flush()
  return scopes and granted(scopes) or 'C' .. missing
end

local scopes, missing = load_all(5, #KEYS)
if not scopes then
  flush()
  return 'C' .. missing
end
local limits, wants = {}, {}
for index = 1, #scopes do limits[index], wants[index] = {unpack_at('<dddddddd', ARGV[10 + index])}, want end
local refused, over = judge(scopes, limits, wants)
if refused then
  flush()
  return 'R' .. pack('<l', epoch) .. refused
end
record = {LIVES, whole(ARGV[7], 1), 0}
for index = 1, #scopes do
  local parts = {}
  take(scopes[index], parts, want[1], want[2], want[3], 1)
  record[3 + index] = {scopes[index].key, parts, scopes[index][BORN]}
end
flush()
call('SET', KEYS[4], cmsgpack.pack(record))
call('ZADD', KEYS[2], format('%.0f', steady + lease), id)
return granted(scopes, over)
