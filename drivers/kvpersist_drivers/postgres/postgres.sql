--- provision
CREATE TABLE IF NOT EXISTS {table} (
    key text COLLATE "C" PRIMARY KEY,
    value bytea NOT NULL,
    version bytea NOT NULL,
    expires_at double precision -- seconds since 1970; NULL: never
);
CREATE INDEX IF NOT EXISTS {index} ON {table} (expires_at) WHERE expires_at IS NOT NULL;

--- server
SELECT
    current_setting('server_version') AS version,
    current_setting('server_version_num')::int AS number,
    pg_encoding_to_char((SELECT encoding FROM pg_database WHERE datname = current_database())) AS encoding,
    current_setting('fsync') = 'on' AND current_setting('synchronous_commit') <> 'off' AS durable,
    current_setting('default_transaction_isolation') AS isolation,
    to_regclass($1)::oid::int8 AS oid

--- columns
SELECT
    (SELECT string_agg(a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || coalesce(' ' || c.collname, ''),
                       ', ' ORDER BY a.attname COLLATE "C")
     FROM pg_attribute a LEFT JOIN pg_collation c ON c.oid = a.attcollation
     WHERE a.attrelid = $1::int8::oid AND a.attnum > 0 AND NOT a.attisdropped)
    || CASE WHEN EXISTS (
        SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0]
        WHERE i.indrelid = $1::int8::oid AND i.indisunique AND i.indpred IS NULL
          AND i.indnkeyatts = 1 AND a.attname = 'key'
    ) THEN '' ELSE ', key not unique' END

--- get
SELECT key, value, version, expires_at FROM {table}
WHERE key = any(string_to_array($1::text, E'\x01\x03')) AND (expires_at IS NULL OR expires_at > $2::float8)

--- locks
-- Takes the locks of a transaction, in the order of their numbers, a row for each. $1: the table's number;
-- $2: 'keys', 'table' to lock it as a whole, NULL for none; $3, $4: the keys to write, and those only to look at.
SELECT CASE
    WHEN l IS NULL AND $2::text = 'table' THEN pg_advisory_xact_lock($1::int4, 1)::text
    WHEN l IS NULL THEN pg_advisory_xact_lock_shared($1::int4, 1)::text
    WHEN l & 1 = 1 THEN pg_advisory_xact_lock($1::int4, (l >> 1)::int4)::text
    ELSE pg_advisory_xact_lock_shared($1::int4, (l >> 1)::int4)::text
END AS taken
FROM unnest(CASE WHEN $2::text IS NOT NULL THEN array_prepend(NULL, ARRAY(
    SELECT max(coalesce(nullif(hashtext(key COLLATE "C"), 1), 2)::int8 * 2 + writes)
    FROM (
        SELECT unnest(string_to_array($3::text, E'\x01\x03')) AS key, 1 AS writes
        UNION ALL
        SELECT unnest(string_to_array($4::text, E'\x01\x03')), 0
    ) AS wanted
    WHERE $2::text = 'keys'
    GROUP BY coalesce(nullif(hashtext(key COLLATE "C"), 1), 2) ORDER BY 1
)) END) AS l

--- guard
-- Takes the locks, looks for what the checks name, and hands out the rows to be put if nothing is in the way.
-- $1..$4: the locks, and so the keys; $5: the versions to be found; $6: now; $7, $9: columns of the rows; $8: their
-- versions, one behind the other. The snapshot is older than the locks, but who changed an entry since has left its
-- mark on the one that is seen: its xmax. Its own writer may have left that too, by ON CONFLICT DO UPDATE, which is
-- no mark. Some marks say nothing, as of what was rolled back: `apply` looks again.
held AS MATERIALIZED (
    SELECT count(taken) AS n FROM ({locks}) AS l
), failed AS MATERIALIZED (
    SELECT wanted.key
    FROM held, unnest(CASE WHEN n > 0 THEN string_to_array($4::text, E'\x01\x03') END, $5::bytea[])
        AS wanted (key, version)
    WHERE wanted.version IS DISTINCT FROM (
        SELECT live.version FROM {table} AS live
        WHERE live.key = wanted.key AND (live.expires_at IS NULL OR live.expires_at > $6::float8)
            AND (live.xmax = '0' OR live.xmax = live.xmin)
    )
), op AS (
    SELECT key, value, substring($8::bytea FROM (8 * number - 7)::int FOR 8) AS version, expires_at, number
    FROM held, unnest(string_to_array($3::text, E'\x01\x03'), $7::bytea[], $9::float8[])
        WITH ORDINALITY AS op (key, value, expires_at, number)
    WHERE n > 0 AND NOT EXISTS (SELECT FROM failed)
)

--- put
-- Puts without conditions, and checks that all of them need. $1..$9: as `guard` says; $10: the channel. Answers the
-- keys that are in the way; then it did nothing.
WITH {guard}, put AS (
    INSERT INTO {table} (key, value, version, expires_at)
    SELECT key, value, version, expires_at FROM op
    ON CONFLICT (key) DO UPDATE
    SET value = excluded.value, version = excluded.version, expires_at = excluded.expires_at
)
SELECT key FROM failed
UNION ALL
SELECT NULL WHERE $10::text IS NOT NULL AND NOT EXISTS (SELECT FROM failed)
    AND pg_notify($10::text, CASE WHEN octet_length($3::text) < 7900 THEN $3::text ELSE '' END)::text IS NULL

--- insert
-- Puts of what must not be there, and checks that all of them need. $1..$10: as for `put`. Answers the keys that are
-- in the way; then it did nothing. A key that came after the snapshot ends the statement by the table's own rule.
WITH {guard}, present AS MATERIALIZED (
    SELECT live.key FROM held, {table} AS live
    WHERE n > 0 AND live.key = any(string_to_array($3::text, E'\x01\x03'))
), inserted AS (
    INSERT INTO {table} (key, value, version, expires_at)
    SELECT key, value, version, expires_at FROM op WHERE NOT EXISTS (SELECT FROM present)
)
SELECT key FROM failed
UNION ALL
SELECT key FROM present
UNION ALL
SELECT NULL WHERE $10::text IS NOT NULL AND NOT EXISTS (SELECT FROM failed) AND NOT EXISTS (SELECT FROM present)
    AND pg_notify($10::text, CASE WHEN octet_length($3::text) < 7900 THEN $3::text ELSE '' END)::text IS NULL

--- swap
-- Puts that are each a batch of its own, and checks that all of them need. $1..$10: as for `put`; $11: the versions
-- the puts expect, as $8. Answers the keys that were written, and those at which the version beside them was found
-- instead; what it does not name was not written, and `apply` finds out why. A marked entry is left alone: where it
-- was replaced meanwhile, UPDATE would find its successor in the way, and leave a mark there that lasts.
WITH {guard}, expected AS MATERIALIZED (
    SELECT op.*, substring($11::bytea FROM (8 * number - 7)::int FOR 8) AS expect FROM op
), swapped AS (
    UPDATE {table} AS live SET value = op.value, version = op.version, expires_at = op.expires_at
    FROM expected AS op
    WHERE live.key = op.key AND live.version = op.expect
        AND (live.expires_at IS NULL OR live.expires_at > $6::float8)
        AND (live.xmax = '0' OR live.xmax = live.xmin)
    RETURNING live.key
), changed AS (
    SELECT string_agg(key, E'\x01\x03') AS keys FROM swapped WHERE $10::text IS NOT NULL
)
SELECT key, NULL::bytea AS version FROM swapped
UNION ALL
SELECT op.key, live.version
FROM expected AS op JOIN {table} AS live
    ON live.key = op.key AND (live.expires_at IS NULL OR live.expires_at > $6::float8)
    AND (live.xmax = '0' OR live.xmax = live.xmin)
WHERE (SELECT count(*) FROM swapped) < cardinality($7::bytea[]) AND live.version <> op.expect
UNION ALL
SELECT NULL, NULL FROM changed WHERE keys IS NOT NULL
    AND pg_notify($10::text, CASE WHEN octet_length(keys) < 7900 THEN keys ELSE '' END)::text IS NULL

--- apply
-- Executed several times in one transaction and one round trip, each time on a fresh snapshot: first, with $2, for
-- the locks; then once for each wave of batches. $1..$4: the locks, and so the keys; $5..$9: the writes, of which
-- those without a value delete; $10, $11: the checks, a negative batch is all of a wave; $12: now; $13: the channel.
-- Answers the operations whose condition does not hold.
WITH op AS MATERIALIZED (
    SELECT * FROM unnest(string_to_array($3::text, E'\x01\x03'),
                         $5::int4[], $6::bytea[], $7::bytea[], $8::bytea[], $9::float8[])
    AS op (key, batch, expect, value, version, expires_at)
    WHERE $2::text IS NULL
), failed AS MATERIALIZED (
    SELECT wanted.batch, wanted.key, live.version
    FROM (
        SELECT key, batch, expect
        FROM unnest(string_to_array($4::text, E'\x01\x03'), $10::int4[], $11::bytea[]) AS wanted (key, batch, expect)
        WHERE $2::text IS NULL
        UNION ALL
        SELECT key, batch, expect FROM op WHERE expect IS NOT NULL
    ) AS wanted
    LEFT JOIN {table} AS live
        ON live.key = wanted.key AND (live.expires_at IS NULL OR live.expires_at > $12::float8)
    WHERE coalesce(live.version, '') <> wanted.expect
), done AS MATERIALIZED (
    SELECT * FROM op
    WHERE batch NOT IN (SELECT batch FROM failed) AND NOT EXISTS (SELECT FROM failed WHERE batch < 0)
), put AS (
    INSERT INTO {table} (key, value, version, expires_at)
    SELECT key, value, version, expires_at FROM done WHERE value IS NOT NULL
    ON CONFLICT (key) DO UPDATE
    SET value = excluded.value, version = excluded.version, expires_at = excluded.expires_at
), deleted AS (
    DELETE FROM {table} AS t USING done WHERE t.key = done.key AND done.value IS NULL
), changed AS (
    SELECT string_agg(key, E'\x01\x03') AS keys FROM done WHERE $13::text IS NOT NULL
)
SELECT batch, key, version FROM failed
UNION ALL
SELECT NULL, NULL, NULL FROM changed WHERE keys IS NOT NULL
    AND pg_notify($13::text, CASE WHEN octet_length(keys) < 7900 THEN keys ELSE '' END)::text IS NULL
UNION ALL
SELECT NULL, NULL, NULL FROM ({locks}) AS l WHERE taken IS NULL

--- scan
SELECT key, value, version, expires_at FROM {table}
WHERE (expires_at IS NULL OR expires_at > $1::float8) AND {range}
ORDER BY key {order} LIMIT $2

--- keys
SELECT key, version, expires_at FROM {table}
WHERE (expires_at IS NULL OR expires_at > $1::float8) AND {range}
ORDER BY key {order} LIMIT $2

--- deref
SELECT e.key, e.value, e.version, e.expires_at, t.key, t.value, t.version, t.expires_at
FROM (
    SELECT key, value, version, expires_at FROM {table}
    WHERE (expires_at IS NULL OR expires_at > $1::float8) AND {range}
    ORDER BY key {order} LIMIT $2
) AS e
LEFT JOIN {table} AS t
    ON t.key = $3::text || replace(convert_from(e.value, 'UTF8'), E'\x01', E'\x01\x02')
    AND (t.expires_at IS NULL OR t.expires_at > $1::float8)
ORDER BY e.key {order}

--- compact
DELETE FROM {table} WHERE key = any(ARRAY(
    SELECT key FROM {table} WHERE expires_at <= $1::float8 ORDER BY expires_at LIMIT $2 FOR UPDATE SKIP LOCKED
))
RETURNING 1
