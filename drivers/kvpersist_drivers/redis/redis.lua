--- commit
-- One drain of one namespace's batches, answered by those that failed, three items each: its number from 1;
-- the position of a condition and the version found there, or -1 and why the batch was refused. A first
-- item of number 0 and position -2: all the others may have been written in part, and the server's error.
-- A batch happens whole or not at all: every condition is read before the first write, and what can refuse
-- a write (memory, a user's rights, a replica, an index that is none) refuses the first one: SADD, or ZADD
-- of nothing. Members come before their values, and all values that do not expire come at once.
--
-- KEYS: the set of namespaces, index, expiries; then the names of all operations of kind 1, of kind 2, ...
-- ARGV: the plan; the namespace's text; the versions expected (kinds 4, 5, 6); the values (kinds 2, 3, 4)
-- The kinds: 1 check for absence, 2 put where absent, 3 put, 4 put over a version, 5 check for a version,
-- 6 delete a version, 7 delete.
-- The plan, in bytes: the sum of 1 if the set of namespaces is another server's, and KEYS[1] is any name,
-- 2 if changes are published, 4 if some values expire, 8 if no name occurs twice (1); the number of the
-- last operation of each kind (3); then each batch: the kind of each operation, with the number of what is
-- checked behind it (3), as several batches may check the same, and 0 (1).
local byte, sub, pcall, type, unpack, KEYS, ARGV = string.byte, string.sub, redis.pcall, type, unpack, KEYS, ARGV
local plan, index = ARGV[1], KEYS[2]
local flags = byte(plan, 1)
local sharded, tells, timed, distinct = flags % 2 > 0, flags % 4 > 1, flags % 8 > 3, flags > 7
local ends = {byte(plan, 2, 22)}
local last = {[0] = 3, 0, 0, 0, 0, 0, 0, 0}
for kind = 1, 7 do last[kind] = ends[3 * kind - 2] * 65536 + ends[3 * kind - 1] * 256 + ends[3 * kind] end
local to_value, to_version = 3 - last[1], 1 - 8 * (last[3] + 1) -- of what is behind KEYS[i]: ARGV[i + ..], 8 * i + ..

local clock
local function now()
  if not clock then
    local time = redis.call('TIME')
    clock = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  return clock
end

local function expiry(value) -- in milliseconds, 0 for never, as the header has it
  local a, b, c, d, e, f, g, h = byte(value, 9, 16)
  return ((((((a * 256 + b) * 256 + c) * 256 + d) * 256 + e) * 256 + f) * 256 + g) * 256 + h
end

local function is_past(value)
  local at = timed and expiry(value) or 0
  return at > 0 and at <= now()
end

local unusable, full = pcall('ZCARD', index), nil
unusable = type(unusable) == 'table' and unusable.err
if last[4] > last[1] and not unusable then
  if sharded then
    full = pcall('ZADD', index, 'XX', '0', '')
  else
    full = pcall('SADD', KEYS[1], ARGV[2])
  end
  full = type(full) == 'table' and full.err
  if full and string.find(full, 'READONLY', 1, true) then return {err = 'READONLY it is a replica'} end
end

-- Where all conditions hold, and no batch touches what another one does, all of them happen.
local hold = distinct and not unusable and not full
for first = 4, last[2], 4000 do
  hold = hold and pcall('EXISTS', unpack(KEYS, first, math.min(first + 3999, last[2]))) == 0
end
for i = last[3] + 1, last[6] do
  local at = 8 * i + to_version
  hold = hold and pcall('GETRANGE', KEYS[i], '0', '7') == sub(ARGV[3], at, at + 7)
end

local failed, final = {}, nil -- which of KEYS had the last word on a name
if not hold then
  final = {}
  local stored, following, batch, at = {}, {}, 0, 23
  for kind = 1, 7 do following[kind] = last[kind - 1] + 1 end
  local function version(name)
    local i = final[name]
    if i then return i <= last[4] and not is_past(ARGV[i + to_value]) and sub(ARGV[i + to_value], 1, 8) or '' end
    if not stored[name] then
      local found = pcall('GETRANGE', name, '0', '7')
      stored[name] = type(found) == 'string' and found or ''
    end
    return stored[name]
  end
  while at <= #plan do
    local position, found, count, written = unusable and -1, unusable, 0, {}
    batch = batch + 1
    local kind = byte(plan, at)
    while kind > 0 do
      local i
      if kind == 1 or kind == 5 then
        local a, b, c = byte(plan, at + 1, at + 3)
        i = last[kind - 1] + 1 + a * 65536 + b * 256 + c
        at = at + 3
      else
        i = following[kind]
        following[kind] = i + 1
        written[#written + 1] = i
      end
      if not position and full and kind > 1 and kind < 5 then position, found = -1, full end
      if not position and kind ~= 3 and kind ~= 7 then
        local expected = kind > 3 and sub(ARGV[3], 8 * i + to_version, 8 * i + to_version + 7) or ''
        found = version(KEYS[i])
        if found ~= expected then position = count end
      end
      at, count = at + 1, count + 1
      kind = byte(plan, at)
    end
    at = at + 1
    if position then
      failed[#failed + 1] = batch
      failed[#failed + 1] = position
      failed[#failed + 1] = found
    else
      for _, i in ipairs(written) do final[KEYS[i]] = i end
    end
  end
end

local from, count, clear, score = #index, 0, 0, 0
local written, values, scored, lapsing, gone, names = {}, {}, {}, {}, {}, {} -- names: of what is gone
local function drop(name)
  names[#names + 1] = name
  gone[#gone + 1] = sub(name, from)
end
for i = last[1] + 1, last[4] do
  local name, value = KEYS[i], ARGV[i + to_value]
  if final and final[name] ~= i then
    -- it was not to be, or not to last
  elseif timed and is_past(value) then
    drop(name)
  else
    local member = sub(name, from)
    if tells then
      count = count + 1
      written[count] = member
    end
    if timed and expiry(value) > 0 then
      lapsing[#lapsing + 1] = i
    else
      values[clear + 1], values[clear + 2] = name, value
      clear = clear + 2
    end
    if final or i <= last[3] then -- what is put over a version is in the index
      scored[score + 1], scored[score + 2] = '0', member
      score = score + 2
    end
  end
end
for i = last[5] + 1, last[7] do
  if not final or final[KEYS[i]] == i then drop(KEYS[i]) end
end

local wrote, trouble = false, nil
local function write(...)
  local done = not trouble and pcall(...)
  if type(done) == 'table' and done.err then trouble = done.err end
  wrote = wrote or not trouble
end
local function write_many(items, count, command, key) -- unpack holds 7,990 values
  for first = 1, count, 4000 do
    local till = math.min(first + 3999, count)
    if key then write(command, key, unpack(items, first, till)) else write(command, unpack(items, first, till)) end
  end
end

write_many(scored, score, 'ZADD', index)
wrote = false -- members without a value are passed over, and leave the index
write_many(values, clear, 'MSET')
local dated = {}
for _, i in ipairs(lapsing) do
  local value = ARGV[i + to_value]
  local at = string.format('%.0f', expiry(value))
  write('SET', KEYS[i], value, 'PXAT', at)
  dated[#dated + 1] = at
  dated[#dated + 1] = sub(KEYS[i], from)
end
write_many(names, #names, 'DEL')
write_many(gone, #gone, 'ZREM', index)
if #dated > 0 and not trouble then
  write_many(dated, #dated, 'ZADD', KEYS[3])
  -- what expired leaves the index here, two for each that is added
  local due = redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', '(' .. now(), 'LIMIT', 0, #dated + 2)
  local prefix = string.gsub(index, '#{', '{', 1)
  for _, member in ipairs(due) do
    local left = redis.call('PTTL', prefix .. member)
    if left == -2 then write('ZREM', index, member) end
    if left < 0 then write('ZREM', KEYS[3], member) end
  end
end
if score == 0 and not sharded and not trouble and not unusable and redis.call('EXISTS', index) == 0 then
  pcall('SREM', KEYS[1], ARGV[2])
end
if tells and wrote then -- what is too long for a message is told as the empty one
  local many = trouble or 2 * count + #gone > 4000
  pcall(sharded and 'SPUBLISH' or 'PUBLISH', (string.gsub(index, '#{', '!{', 1)), many and '' or cmsgpack.pack({written, gone}))
end
if trouble and not wrote then
  return {err = string.find(trouble, 'READONLY', 1, true) and 'READONLY it is a replica' or trouble}
end
for at, item in ipairs(trouble and {0, -2, trouble} or {}) do table.insert(failed, at, item) end
return failed

--- scan
-- One page of one namespace, in the order of keys: the last member looked at if there may be more, then
-- for every live entry its member, what is stored, and with a target prefix what is stored there.
-- Members whose value expired leave the index here, where the server may be written.
--
-- KEYS: index. ARGV: prefix of the names, low, high, limit, 'reverse' or '', 'keys' or '', prefix of targets or ''
local index, prefix, low, high, limit = KEYS[1], ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local members
if ARGV[5] == '' then
  members = redis.call('ZRANGEBYLEX', index, low, high, 'LIMIT', 0, limit)
else
  members = redis.call('ZREVRANGEBYLEX', index, high, low, 'LIMIT', 0, limit)
end
local count = #members
if count == 0 then return {false} end

local names, stored = {}, nil
for i = 1, count do names[i] = prefix .. members[i] end
if ARGV[6] == '' then
  stored = redis.call('MGET', unpack(names))
else
  stored = {}
  for i = 1, count do
    local head = redis.pcall('GETRANGE', names[i], 0, 19)
    if head == '' and redis.call('EXISTS', names[i]) == 0 then head = false end
    stored[i] = type(head) == 'string' and head
  end
end

local found, gone, targets = {count == limit and members[count]}, {}, {}
for i = 1, count do
  if stored[i] then
    found[#found + 1] = members[i]
    found[#found + 1] = stored[i]
    if ARGV[7] ~= '' then
      targets[#targets + 1] = ARGV[7] .. string.sub(stored[i], 21)
      found[#found + 1] = false
    end
  else
    gone[#gone + 1] = members[i]
  end
end
if #targets > 0 then
  local values = redis.call('MGET', unpack(targets))
  for i = 1, #targets do found[1 + 3 * i] = values[i] end
end
if #gone > 0 then redis.pcall('ZREM', index, unpack(gone)) end
return found

--- sweep
-- Take expired entries of one namespace out of its index; return how many went, and at how many was looked.
--
-- KEYS: index, expiries. ARGV: prefix of the names, limit
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local due = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', '(' .. now, 'LIMIT', 0, tonumber(ARGV[2]))
local removed, looked = 0, 0
for _, member in ipairs(due) do
  local left = redis.call('PTTL', ARGV[1] .. member)
  if left < 0 then
    looked = looked + 1
    if left == -2 then removed = removed + redis.call('ZREM', KEYS[1], member) end
    redis.call('ZREM', KEYS[2], member)
  end
end
return {removed, looked}

--- tell
-- Publish nothing, as a commit publishes changes. KEYS: a channel. ARGV: PUBLISH or SPUBLISH
return redis.call(ARGV[1], KEYS[1], cmsgpack.pack({}))

--- permit
-- Every command that a drain may need, to no effect, so that a user who lacks one is refused as a whole.
--
-- KEYS: a name that holds nothing
redis.call('SET', KEYS[1], '', 'XX')
redis.call('ZADD', KEYS[1], 'XX', 0, '')
redis.call('ZREM', KEYS[1], '')
redis.call('SREM', KEYS[1], '')
redis.call('ZCARD', KEYS[1])
redis.call('DEL', KEYS[1])
redis.call('MSET', KEYS[1], '')
redis.call('DEL', KEYS[1])
redis.call('GETRANGE', KEYS[1], 0, 7)
redis.call('EXISTS', KEYS[1])
redis.call('PTTL', KEYS[1])
redis.call('TIME')
redis.call('ZRANGEBYSCORE', KEYS[1], 0, 0)
return 1
