--- commit
-- One drain of batches, answered by those that failed, three items each: its number from 1; the
-- position of a condition and the version found there, or -1 (-2: part of it was written) and the
-- server's error. A batch happens whole or not at all: its conditions are read before its first write,
-- and what can refuse a write (memory, a user's rights, an index that is none) refuses the first one,
-- which for every namespace with puts is SADD, or ZADD of nothing. A replica refuses all of it.
--
-- KEYS: the set of namespaces; index and expiries of each namespace; one name for each operation
-- ARGV: the plan; each namespace's text; then for each put its value, behind its expiry if it has one
-- The plan, in bytes: 1 if the set of namespaces is another server's, and KEYS[1] is any name, + 2 if
-- changes are published (1); namespaces (2), for each whether it has puts (1); then for every batch its
-- namespace (2), operations (3), and for each operation kind + 4 * condition (1), the version expected (8)
-- where the condition is 2. Kinds: 0 check, 1 put, 2 expiring put, 3 delete. Conditions: 0 none, 1 absent, 2 version.
local byte, sub, call, pcall = string.byte, string.sub, redis.call, redis.pcall
local plan, at = ARGV[1], 4
local flags = byte(plan, 1)
local sharded, tells = flags % 2 == 1, flags > 1
local spaces = byte(plan, 2) * 256 + byte(plan, 3)
local key, arg = 1 + 2 * spaces, 1 + spaces
local unusable, full, members, expiring = {}, {}, {}, {}
for s = 1, spaces do
  local size = pcall('ZCARD', KEYS[2 * s])
  if type(size) == 'table' then
    unusable[s] = size.err
  elseif byte(plan, at) == 1 then
    local added
    if sharded then
      added = pcall('ZADD', KEYS[2 * s], 'XX', 0, '')
    else
      added = pcall('SADD', KEYS[1], ARGV[1 + s])
    end
    if type(added) == 'table' then
      if string.find(added.err, 'READONLY', 1, true) then return {err = 'READONLY it is a replica'} end
      full[s] = added.err
    end
  end
  members[s] = {}
  at = at + 1
end

local clock
local function now()
  if not clock then
    local time = call('TIME')
    clock = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  return clock
end

local failed, number = {}, 0
local kinds, args = {}, {}
while at <= #plan do
  local s = byte(plan, at) * 256 + byte(plan, at + 1)
  local count = (byte(plan, at + 2) * 256 + byte(plan, at + 3)) * 256 + byte(plan, at + 4)
  local position, found = nil, unusable[s]
  number, at = number + 1, at + 5
  if found then position = -1 end
  for i = 1, count do
    local code = byte(plan, at)
    local kind = code % 4
    kinds[i], args[i] = kind, arg
    at = at + 1
    if kind == 1 then arg = arg + 1 elseif kind == 2 then arg = arg + 2 end
    if full[s] and not position and (kind == 1 or kind == 2) then position, found = -1, full[s] end
    if code > 3 then
      local expected = ''
      if code > 7 then
        expected = sub(plan, at, at + 7)
        at = at + 8
      end
      if not position then
        found = pcall('GETRANGE', KEYS[key + i], 0, 7)
        if type(found) == 'table' then found = '' end
        if found ~= expected then position = i - 1 end
      end
    end
  end
  if not position then
    local here, from, wrote = members[s], #KEYS[2 * s], false
    for i = 1, count do
      local kind, name, value = kinds[i], KEYS[key + i], args[i] + 1
      if kind == 2 and tonumber(ARGV[value]) <= now() then kind = 3 end
      if kind > 0 then
        local done
        if kind == 1 then
          done = pcall('SET', name, ARGV[value])
        elseif kind == 2 then
          done = pcall('SET', name, ARGV[value + 1], 'PXAT', ARGV[value])
        else
          done = pcall('DEL', name)
        end
        if type(done) == 'table' and done.err then
          if string.find(done.err, 'READONLY', 1, true) then return {err = 'READONLY it is a replica'} end
          position, found = wrote and -2 or -1, done.err
          break
        end
        local member = sub(name, from)
        wrote, here[member] = true, kind ~= 3
        if kind == 2 then
          local list = expiring[s] or {}
          expiring[s] = list
          list[#list + 1] = ARGV[value]
          list[#list + 1] = member
        end
      end
    end
  end
  if position then
    failed[#failed + 1] = number
    failed[#failed + 1] = position
    failed[#failed + 1] = found
  end
  key = key + count
end

local function each_many(items, run) -- unpack holds 7,990 values
  for first = 1, #items, 4000 do
    run(unpack(items, first, math.min(first + 3999, #items)))
  end
end

for s = 1, spaces do
  local index, expiries = KEYS[2 * s], KEYS[2 * s + 1]
  local added, gone = {}, {}
  for member, there in pairs(members[s]) do
    if there then
      added[#added + 1] = 0
      added[#added + 1] = member
    else
      gone[#gone + 1] = member
    end
  end
  each_many(added, function(...) call('ZADD', index, ...) end)
  each_many(gone, function(...) call('ZREM', index, ...) end)
  if expiring[s] then
    each_many(expiring[s], function(...) call('ZADD', expiries, ...) end)
    -- what expired leaves the index here, two for each that is added
    local due = call('ZRANGEBYSCORE', expiries, '-inf', '(' .. now(), 'LIMIT', 0, #expiring[s] + 2)
    local prefix = string.gsub(index, '#{', '{', 1)
    for _, member in ipairs(due) do
      local left = call('PTTL', prefix .. member)
      if left == -2 then call('ZREM', index, member) end
      if left < 0 then call('ZREM', expiries, member) end
    end
  end
  if not sharded and #added == 0 and not unusable[s] and call('EXISTS', index) == 0 then
    pcall('SREM', KEYS[1], ARGV[1 + s])
  end
  if tells and #added + #gone > 0 then -- what is too long for a message is told as the empty one
    local changed = #added + #gone > 4000 and '' or cmsgpack.pack({added, gone})
    pcall(sharded and 'SPUBLISH' or 'PUBLISH', (string.gsub(index, '#{', '!{', 1)), changed)
  end
end
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
-- Every command that a drain may need, with no effect, so that a user who lacks one is refused as a whole.
--
-- KEYS: a name that holds nothing
redis.call('SET', KEYS[1], '', 'XX')
redis.call('ZADD', KEYS[1], 'XX', 0, '')
redis.call('ZREM', KEYS[1], '')
redis.call('SREM', KEYS[1], '')
redis.call('ZCARD', KEYS[1])
redis.call('DEL', KEYS[1])
redis.call('GETRANGE', KEYS[1], 0, 7)
redis.call('EXISTS', KEYS[1])
redis.call('PTTL', KEYS[1])
redis.call('TIME')
redis.call('ZRANGEBYSCORE', KEYS[1], 0, 0)
return 1
