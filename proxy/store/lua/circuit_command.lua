-- command: by hand.
-- ARGV[2] name, ARGV[3] open or reset, ARGV[4] who
local name = ARGV[2]
local record = load(name) or fresh(0)
expire(record)
record.v, record.w = {}, {[ARGV[4]] = 'by hand'}
record.u, record.k, record.x = now, 0, -1
record.h = ARGV[3] == 'open'
move(record, record.h and 'open' or 'closed')
keep(name, record)
return answer(record)
