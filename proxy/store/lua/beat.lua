-- beat: a process says that it lives, or that it leaves, and is told how many do.
-- KEYS[4] processes: a sorted set by the steady time at which each is given up
-- ARGV[5] id of the process, [6] milliseconds until it is given up; 0: it leaves
-- Answers P (processes, epoch or 0 while the store is cold).
local life = whole(ARGV[6], MAX_SUM)
-- Removed first: with that a script may go on although memory is full.
call('ZREM', KEYS[4], ARGV[5])
call('ZREMRANGEBYSCORE', KEYS[4], '-inf', format('%.0f', steady))
if life > 0 then
  call('ZADD', KEYS[4], format('%.0f', steady + life), ARGV[5])
  -- Of a deployment that is no more, nothing stays.
  call('PEXPIRE', KEYS[4], '86400000')
end
if is_open and clock_moved then write_epoch() end
return 'P' .. pack('<ll', call('ZCARD', KEYS[4]), epoch or 0)
