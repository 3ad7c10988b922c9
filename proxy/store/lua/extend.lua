-- extend: gives live reservations a new lease from now on.
-- ARGV[5] milliseconds of lease, ARGV[6...] ids
-- Answers X (places of the ids that are live no more), C cold.
if not is_open then return 'C' end
local lease_until = steady + whole(ARGV[5], MAX_SUM)
local longer, gone = {}, {}
for index = 6, #ARGV do
  local score = call('ZSCORE', KEYS[2], ARGV[index])
  local lives = score
  if not score then
    -- A lease that somebody removed by hand comes back as long as the reservation says that it lives.
    local record = read_record(ARGV[2] .. ARGV[index])
    lives = record and record[1] == LIVES
  end
  if not lives then
    gone[#gone + 1] = pack('<l', index - 6)
  elseif not score or tonumber(score) < lease_until then
    longer[#longer + 1] = ARGV[index]
  end
end
for index = 1, #longer do
  -- Removed first: with that a script may go on although memory is full.
  call('ZREM', KEYS[2], longer[index])
  call('ZADD', KEYS[2], format('%.0f', lease_until), longer[index])
end
reap()
flush()
return 'X' .. table.concat(gone)
