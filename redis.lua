-- What is done in Redis, where one thing happens at a time. Called with the keys below, and
-- as arguments: the newest id that the caller has, how many entries a stream keeps, and then
-- for each thing to do its name, how many arguments it takes, and these. It answers with a
-- reply to each. Of keys and of the rooms' newest messages Redis remembers ten for each entry
-- that a stream keeps.

local ARGV, call, format = ARGV, redis.call, string.format
local STATE, STREAMS, KNOWN, ORDER, ROOMS, USERS, INSTANCES = KEYS[1], {KEYS[2], KEYS[3]}, KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local MESSAGES, SIGNALS = 1, 2
local HEAD, EVENTS = tonumber(ARGV[1]), tonumber(ARGV[2])

local function last_of(stream)
	if call('EXISTS', stream) == 0 then return 0 end
	local info = call('XINFO', 'STREAM', stream)
	for i = 1, #info, 2 do
		if info[i] == 'last-generated-id' then return tonumber(string.match(info[i + 1], '%d+')) end
	end
end

-- The state is read and written once, for all that is to do: the newest id, the first one
-- since Redis was empty, the newest of each stream; and the newest message of a room.
local state = call('HMGET', STATE, 'id', 'born', MESSAGES, SIGNALS)
local newest, born, newest_of = state[1], state[2], {state[3] or '0', state[4] or '0'}
local last = tonumber(newest) or math.max(last_of(STREAMS[1]), last_of(STREAMS[2]))
local newest_in = {} -- by room, of those that get a message now; of others ROOMS has it
local time = call('TIME')
local now = time[1] * 1000000 + time[2]
local milliseconds = format('%.0f', now / 1000)

-- add appends an entry, and returns its id.
local function add(stream, ttl, instance, kind, room, user, data)
	last = math.max(now, last + 16, HEAD + 1) -- 16 is idStep
	local id = format('%.0f', last)
	local head = newest_of[stream] .. ' ' .. milliseconds .. ' ' .. ttl .. ' ' .. instance .. ' ' .. kind .. ' ' .. room
	call('XADD', STREAMS[stream], 'MAXLEN', '~', EVENTS, id .. '-0', 'event', head .. '\n' .. user .. '\n' .. data)
	newest, born, newest_of[stream] = id, born or id, id
	return id
end

local to_do = {}

-- publish answers with the id, after an n for a new event, a k for a known key, an i if there
-- is a newer message.
function to_do.publish(room, kind, user, ttl, key, only, data)
	local field = room .. ' ' .. key
	if key ~= '' then
		local id = call('HGET', KNOWN, field)
		if id then return 'k' .. id end
	end
	if only ~= '' then
		local id = newest_in[room] or format('%.0f', call('ZSCORE', ROOMS, room) or 0)
		if id ~= only then return 'i' .. id end
	end
	local id = add(ttl == '0' and MESSAGES or SIGNALS, ttl, '-', kind, room, user, data)
	if ttl == '0' then newest_in[room] = id end
	if key ~= '' then
		call('HSET', KNOWN, field, id)
		if call('RPUSH', ORDER, field) > 10 * EVENTS then call('HDEL', KNOWN, call('LPOP', ORDER)) end
	end
	return 'n' .. id
end

-- nothing is for who wants the streams to be read, as they are after each batch.
function to_do.nothing()
	return ''
end

function to_do.erase(room)
	newest_in[room] = nil
	call('ZREM', ROOMS, room)
	return add(MESSAGES, '0', '-', 'gap', room, '', '')
end

-- delete removes what a room has in a stream, a part at a time. It answers where to go on, or
-- with nothing.
function to_do.delete(stream, room, from, to)
	stream = STREAMS[tonumber(stream)]
	local entries = call('XRANGE', stream, from, to, 'COUNT', 200)
	for _, entry in ipairs(entries) do
		if string.match(entry[2][2] or '', ' (%S+)\n') == room then call('XDEL', stream, entry[1]) end
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

-- share answers with the id, or with 0 if nothing changed for all.
function to_do.share(instance, room, user, client, state)
	if state == 'goodbye' then return add(SIGNALS, '1', instance, 'goodbye', room, user, client) end
	if state == 'count' then return add(SIGNALS, '60000', instance, 'presence', room, '', '') end
	return lease(instance, room, user, state)
end

function to_do.beat(instance, age, status)
	local known = call('HEXISTS', INSTANCES, instance)
	call('HSET', INSTANCES, instance, format('%.0f', time[1] - age) .. ' ' .. status)
	add(SIGNALS, '1', instance, 'beat', '-', '', '')
	return {known, time[1], call('HGETALL', INSTANCES)}
end

-- end_silent lets go of the users of an instance if it is silent, a part at a time. It answers
-- where to go on, or with 0.
function to_do.end_silent(instance, silent, cursor)
	local beat = call('HGET', INSTANCES, instance)
	if not beat or time[1] - string.match(beat, '%d+') <= tonumber(silent) then return '0' end
	local found = call('HSCAN', USERS, cursor, 'COUNT', 200)
	for i = 1, #found[2], 2 do
		local room, user = string.match(found[2][i], '^(%S+) (.*)$')
		if room then lease(instance, room, user, 'offline') end
	end
	if found[1] == '0' then call('HDEL', INSTANCES, instance) end
	return found[1]
end

local replies, i = {}, 3
while ARGV[i] do
	local from, to = i + 2, i + 1 + ARGV[i + 1]
	local ok, reply = pcall(to_do[ARGV[i]], unpack(ARGV, from, to)) -- an error is of this one alone
	replies[#replies + 1] = ok and reply or type(reply) == 'table' and reply or {err = tostring(reply)}
	i = to + 1
end
if newest ~= state[1] then
	call('HSET', STATE, 'id', newest, 'born', born, MESSAGES, newest_of[1], SIGNALS, newest_of[2])
end
local scores = {}
for room, id in pairs(newest_in) do
	scores[#scores + 1], scores[#scores + 2] = id, room
end
if scores[1] and redis.pcall('ZADD', ROOMS, unpack(scores)) ~= 0 then
	redis.pcall('ZREMRANGEBYRANK', ROOMS, 0, -10 * EVENTS - 1)
end
return replies
