-- What is done in Redis, where one thing happens at a time. Called with the keys below, and
-- as arguments: the newest id that the caller has, how many entries a stream keeps, what
-- to do, and what that takes. Of keys and of the rooms' newest messages Redis remembers
-- ten for each entry that a stream keeps.

local call = redis.call
local STATE, STREAMS, KNOWN, ORDER, ROOMS, USERS, INSTANCES = KEYS[1], {KEYS[2], KEYS[3]}, KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local MESSAGES, SIGNALS = 1, 2
local HEAD, EVENTS, WHAT = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]

local function last_of(stream)
	if call('EXISTS', stream) == 0 then return 0 end
	local info = call('XINFO', 'STREAM', stream)
	for i = 1, #info, 2 do
		if info[i] == 'last-generated-id' then return tonumber(string.match(info[i + 1], '%d+')) end
	end
end

-- add appends an entry, and returns its id.
local function add(stream, ttl, instance, kind, room, user, data)
	local state = call('HMGET', STATE, 'id', stream)
	local last = state[1] or math.max(last_of(STREAMS[1]), last_of(STREAMS[2]))
	local t = call('TIME')
	local now = t[1] * 1000000 + t[2]
	local id = string.format('%.0f', math.max(now, last + 16, HEAD + 1)) -- 16 is idStep
	if not state[1] then call('HSET', STATE, 'born', id) end
	local head = (state[2] or '0') .. ' ' .. string.format('%.0f', now / 1000) .. ' ' .. ttl .. ' ' .. instance .. ' ' .. kind .. ' ' .. room
	call('XADD', STREAMS[stream], 'MAXLEN', '~', EVENTS, id .. '-0', 'head', head, 'user', user, 'data', data)
	call('HSET', STATE, 'id', id, stream, id)
	return id
end

-- publish answers with the id, after an n for a new event, a k for a known key, an i if there
-- is a newer message.
if WHAT == 'publish' then
	local room, kind, user, ttl, key, only, data = unpack(ARGV, 4)
	local field = room .. ' ' .. key
	if key ~= '' then
		local id = call('HGET', KNOWN, field)
		if id then return 'k' .. id end
	end
	if only ~= '' then
		local newest = string.format('%.0f', call('ZSCORE', ROOMS, room) or 0)
		if newest ~= only then return 'i' .. newest end
	end
	local id = add(ttl == '0' and MESSAGES or SIGNALS, ttl, '-', kind, room, user, data)
	if ttl == '0' then
		call('ZADD', ROOMS, id, room)
		if call('ZCARD', ROOMS) > 10 * EVENTS then call('ZPOPMIN', ROOMS) end
	end
	if key ~= '' then
		call('HSET', KNOWN, field, id)
		if call('RPUSH', ORDER, field) > 10 * EVENTS then call('HDEL', KNOWN, call('LPOP', ORDER)) end
	end
	return 'n' .. id
end

if WHAT == 'erase' then
	call('ZREM', ROOMS, ARGV[4])
	return add(MESSAGES, '0', '-', 'gap', ARGV[4], '', '')
end

-- delete removes what a room has in a stream, a part at a time. It answers where to go on, or
-- with nothing.
if WHAT == 'delete' then
	local stream, room = STREAMS[tonumber(ARGV[4])], ARGV[5]
	local entries = call('XRANGE', stream, ARGV[6], ARGV[7], 'COUNT', 200)
	for _, entry in ipairs(entries) do
		if string.match(entry[2][2] or '', ' (%S+)$') == room then call('XDEL', stream, entry[1]) end
	end
	return entries[200] and '(' .. entries[200][1] or ''
end

-- USERS has a field for each user of a room: the state, and the instances that hold the user.
local function lease(instance, room, user, state)
	local field = room .. ' ' .. user
	local old, holders = 'offline', ''
	local value = call('HGET', USERS, field)
	if value then old, holders = string.match(value, '^(%a+) (.*)$') end
	local i = string.find(holders, instance .. ' ', 1, true)
	if state == 'offline' then
		if not i then return '0' end
		holders = string.sub(holders, 1, i - 1) .. string.sub(holders, i + #instance + 1)
		if holders ~= '' then state = old == 'typing' and 'online' or old end
	elseif not i then
		holders = holders .. instance .. ' '
	end
	if holders == '' then call('HDEL', USERS, field) else call('HSET', USERS, field, state .. ' ' .. holders) end
	if state == old then return '0' end
	return add(SIGNALS, '60000', instance, 'presence', room, user, '"' .. state .. '"')
end

-- share answers with the newest id.
if WHAT == 'share' then
	local newest = '0'
	for i = 5, #ARGV, 4 do
		local room, user, client, state = unpack(ARGV, i, i + 3)
		local id
		if state == 'goodbye' then
			id = add(SIGNALS, '1', ARGV[4], 'goodbye', room, user, client)
		elseif state == 'count' then
			id = add(SIGNALS, '60000', ARGV[4], 'presence', room, '', '')
		else
			id = lease(ARGV[4], room, user, state)
		end
		if id ~= '0' then newest = id end
	end
	return newest
end

if WHAT == 'beat' then
	local instance, age, status = unpack(ARGV, 4)
	local now = call('TIME')[1]
	local known = call('HEXISTS', INSTANCES, instance)
	call('HSET', INSTANCES, instance, string.format('%.0f', now - age) .. ' ' .. status)
	add(SIGNALS, '1', instance, 'beat', '-', '', '')
	return {call('HGET', STATE, 'born'), known, now, call('HGETALL', INSTANCES)}
end

-- end lets go of the users of an instance if it is silent, a part at a time. It answers where
-- to go on, or with 0.
if WHAT == 'end' then
	local instance, silent, cursor = unpack(ARGV, 4)
	local beat = call('HGET', INSTANCES, instance)
	if not beat or call('TIME')[1] - string.match(beat, '%d+') <= tonumber(silent) then return '0' end
	local found = call('HSCAN', USERS, cursor, 'COUNT', 200)
	for i = 1, #found[2], 2 do
		local room, user = string.match(found[2][i], '^(%S+) (.*)$')
		if room then lease(instance, room, user, 'offline') end
	end
	if found[1] == '0' then call('HDEL', INSTANCES, instance) end
	return found[1]
end
